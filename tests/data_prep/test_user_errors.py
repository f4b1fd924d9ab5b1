"""A user error is a warning or a one-line error with its location, and no data is lost silently."""

import json
import os
import re
import resource
import subprocess

import pytest
import tokenizers

from data_prep import units
from data_prep.pipeline import prepare
from data_prep.utils.console import UserError
from tests.data_prep.conftest import MPIRUN, needs_mpi
from tests.messages import receive_messages
from tests.processes import TIMEOUT
from tests.small_corpora import data_config, json_source


def test_errors_in_the_data_are_one_line(
    corpus, reference_corpus, run_expecting_user_error, write_jsonl, pairs, tmp_path
):
    def error_with_source(path, *more: str) -> str:
        return run_expecting_user_error(
            corpus, f"data.path={tmp_path / 'out'}", f"data.sources.0.path={path}", "data.on_malformed=fail", *more
        )

    absent = tmp_path / "absent.jsonl"
    assert error_with_source(absent) == f"cannot read {absent} (data.sources.0.path): No such file or directory"
    assert error_with_source("").startswith("data.sources.0.path is not set")
    assert "holds no file that ends in .json, " in error_with_source(tmp_path)
    # with several units, a progress bar could appear, and other workers are busy when one fails
    bad = write_jsonl(tmp_path / "bad.jsonl", pairs(9))
    with bad.open("a") as file:
        file.write('{"text": "a", "code"\n')
    tokenizer_override = f"data.tokenizer={{path: {reference_corpus / 'tokenizer'}}}"
    message = error_with_source(
        bad, tokenizer_override, "data.workers=2", f"data.sources={json.dumps([json_source(bad)] * 3)}"
    )
    assert message.startswith(f"{bad}:10: not JSON (Expecting ':' delimiter")
    good = write_jsonl(tmp_path / "good.jsonl", pairs(9))
    assert error_with_source(
        good, "data.tokenizer={path: nowhere}", f"data.sources={json.dumps([json_source(good)])}"
    ).startswith("nowhere: no tokenizer found")
    assert "data.sources is empty" in error_with_source(bad, "data.sources=[]")


@needs_mpi
def test_an_error_under_mpirun_is_one_line(corpus, command, write_jsonl, tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [3])
    for sources, expected in (
        ([json_source(bad)] * 2, f"{bad}:1: a value of type int, not a JSON object"),
        ([json_source("absent")], "cannot read absent"),
    ):
        arguments, environment = command(
            corpus, f"data.path={tmp_path / 'out'}", "data.on_malformed=fail", f"data.sources={json.dumps(sources)}"
        )
        done = subprocess.run(
            [MPIRUN, "-n", "2", *arguments], env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and expected in errors[0] and "Traceback" not in done.stderr, (
            done.stderr
        )


@pytest.mark.parametrize(
    "modify, message",
    [
        (
            lambda content: content.replace(b"}\n{", b"} {", 1),
            "a.jsonl changed during the preparation; "
            "run the preparation again while no other process writes to this file",
        ),
        (
            lambda content: content.replace(b"SELECT", b"select", 1),
            "a file of the sources changed during the preparation",
        ),
        (lambda content: content[:-30], "a.jsonl became shorter while it was being prepared"),
    ],
)
def test_a_source_file_changed_during_the_preparation_is_detected(write_jsonl, pairs, tmp_path, modify, message):
    path = write_jsonl(tmp_path / "a.jsonl", pairs(300))

    def change(line: str) -> None:
        if line.startswith("tokenizing"):
            path.write_bytes(modify(path.read_bytes()))

    with receive_messages(change), pytest.raises(UserError, match=message):
        prepare(data_config(tmp_path / "out", json_source(path)))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_malformed_line_far_into_a_file_is_located_by_byte_offset(
    write_jsonl, pairs, tmp_path, monkeypatch, set_piece_size
):
    path = write_jsonl(tmp_path / "a.jsonl", [*pairs(300), 3, *pairs(300, seed=1)])
    set_piece_size(2000)
    message = r"a\.jsonl:301: a value of type int, not a JSON object"
    for limit in (units.COUNTED_BYTES, 2000):
        monkeypatch.setattr(units, "COUNTED_BYTES", limit)
        with pytest.raises(UserError, match=message) as raised:
            prepare(data_config(tmp_path / str(limit), json_source(path)))
        message = r"a\.jsonl, line ([\d,]+) after byte ([\d,]+): a value of type int, not a JSON object"
    line, byte = (int(number.replace(",", "")) for number in re.search(message, str(raised.value)).groups())
    assert path.read_bytes()[byte:].split(b"\n", 1)[1 if byte else 0].split(b"\n")[line - 1] == b"3"


@pytest.mark.parametrize(
    "rows, settings, expected",
    [
        (
            [{"question": "a", "answer": "b"}],
            {},
            r"no record is left: 1 empty \(no view holds text; the first: .*a\.jsonl:1: ''\); check data\.views",
        ),
        (
            [{"text": "a b"}, {"text": "  ", "code": "\n"}],
            {},
            r"1 empty \(.*a\.jsonl:2: ''\); 1 one_sided \(.*a\.jsonl:1: 'a b'\)",
        ),
        (
            [{"text": "a", "code": "b"}],
            {"sequence_length": 8},
            r"1 too_long \(.*a\.jsonl:1: needs data\.sequence_length=19: 'a \| b'\)",
        ),
        ([[], 3], {"on_malformed": "drop"}, r"2 malformed \(.*a\.jsonl:1: a value of type list, not a JSON object\)"),
        ([], {}, "no record is left: the sources are empty"),
        (
            [{"question": "a", "answer": "b"}],
            {"tokenizer": {"vocab_size": 400}},
            r"no record is left: 1 empty .*a\.jsonl:1: ''\); check data\.views",
        ),
        ([], {"tokenizer": {"vocab_size": 400}}, "the sources are empty"),
        ([3], {"tokenizer": {"vocab_size": 400}}, r"a\.jsonl:1: a value of type int, not a JSON object"),
    ],
)
def test_an_empty_corpus_is_an_error(write_jsonl, reference_corpus, tmp_path, rows, settings, expected):
    source = json_source(write_jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(UserError, match=expected) as raised:
        prepare(
            data_config(
                tmp_path / "out", source, **({"tokenizer": {"path": str(reference_corpus / "tokenizer")}} | settings)
            )
        )
    assert "\n" not in str(raised.value) and not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("key", "nearest"), [("dta", "data"), ("evalution", "evaluation"), ("evaluations", "evaluation")]
)
def test_a_misspelt_section_that_is_read_is_an_error(corpus, run_expecting_user_error, key, nearest):
    message = run_expecting_user_error(corpus, f"{key}.tasks=[]")
    assert message == f"unknown key {key!r} in {corpus}; the nearest known key is {nearest!r}"


def test_an_unwritable_folder_is_one_line(corpus, run_expecting_user_error, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write the corpus" in run_expecting_user_error(corpus, f"data.path={tmp_path / 'file'}")

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # writing more fails, as on a full disk

    message = run_expecting_user_error(corpus, f"data.path={tmp_path / 'out'}", preexec_fn=limit_file_size)
    assert message.startswith(f"cannot write the corpus to {tmp_path / 'out'}: ") and "File too large" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_read_permission_is_one_line(corpus, run_expecting_user_error, write_jsonl, pairs, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", pairs(3))
    path.chmod(0)
    assert "Permission denied" in run_expecting_user_error(
        corpus, f"data.path={tmp_path / 'out'}", f"data.sources.0.path={path}"
    )


@pytest.mark.parametrize("name", ["continues", "checksum", "../x", "", "a b", "1st"])
def test_reserved_and_invalid_view_names_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=rf"data\.views: .*{re.escape(repr(name))} cannot be the name of a view"):
        data_config(tmp_path, views=[name, "code"])


def test_a_source_without_kept_records_is_warned_about(write_jsonl, pairs, tmp_path, messages):
    sources = [
        json_source(write_jsonl(tmp_path / "a.jsonl", pairs(50))),
        json_source(write_jsonl(tmp_path / "b.jsonl", pairs(9)), views={"text": "txet", "code": "code"}),
    ]
    prepare(data_config(tmp_path / "out", *sources))
    assert (
        "WARNING: data.sources.1 has 9 records, but none of them was kept; check its columns, and see summary.md"
        in messages
    )


def test_a_lossy_tokenizer_is_warned_about_and_a_missing_one_fails_before_the_scan(
    write_jsonl, pairs, tmp_path, messages
):
    source = json_source(write_jsonl(tmp_path / "a.jsonl", pairs(50)))
    for name, normalizer in (("lower", tokenizers.normalizers.Lowercase()), ("lossless", None)):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        if normalizer:
            tokenizer.normalizer = normalizer
        tokenizer.train_from_iterator(
            ["select all"] * 9,
            tokenizers.trainers.BpeTrainer(
                vocab_size=300, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
            ),
        )
        tokenizer.save(str(tmp_path / f"{name}.json"))
        messages.clear()
        prepare(
            data_config(
                tmp_path / name, source, tokenizer={"path": str(tmp_path / f"{name}.json")}, sequence_length=512
            )
        )
        warnings = [line for line in messages if line.startswith("WARNING: the tokenizer")]
        assert len(warnings) == (name == "lower") and all(
            "does not reproduce 50 of 100 texts" in line and "'SELECT " in line for line in warnings
        )
    messages.clear()
    with pytest.raises(UserError, match="no tokenizer found"):
        prepare(data_config(tmp_path / "none", source, tokenizer={"path": str(tmp_path / "absent")}))
    assert not any(line.startswith("scanning") for line in messages)


@pytest.mark.parametrize(
    "kind, read, skipped",
    [
        ("json", "a.jsonl", ["B.JSONL", "c.jsonl.bz2", "d.jsonl.xz", ".e.jsonl"]),
        ("text", "a.txt", [".b.txt"]),
        ("json", "a.json", ["b.parquet"]),
        ("python", "a.py", []),
    ],
)
def test_files_skipped_by_name_are_reported(
    write_jsonl, pairs, reference_corpus, tmp_path, kind, read, skipped, messages
):
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / read, pairs(3))
    if kind == "python":
        (folder / read).write_text('def f(x):\n    "Return it."\n    return x\n')
        (folder / "README").write_text("not a program")
    for name in skipped:
        (folder / name).write_bytes(b"anything")
    prepare(
        data_config(
            tmp_path / "out",
            {"type": kind, "path": str(folder)},
            tokenizer={"path": str(reference_corpus / "tokenizer")},
            missing_views="keep",
        )
    )
    notes = [line for line in messages if "skipping" in line]
    assert len(notes) == bool(skipped) and all(str(folder / name) in notes[0] for name in sorted(skipped)[:3])
    assert (
        not skipped
        or (f"skipping {len(skipped)} files by name: " if len(skipped) > 1 else "skipping 1 file by name: ") in notes[0]
    )
