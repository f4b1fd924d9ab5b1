"""End-to-end tests: any number of processes prepares the same correct shards, and no record is lost."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import sentencepiece
import tokenizers

from data_prep import encode
from data_prep.config import NlrxSource
from data_prep.nlrx_grammar import generate
from data_prep.pipeline import prepare
from data_prep.shards import open_shard
from data_prep.sources.nlrx import PIECE_RECORDS, Nlrx
from data_prep.tokenizer import Tokenizer
from data_prep.tools.verify import verify
from data_prep.utils.console import UserError
from tests.data_prep.conftest import NUM_FILES
from tests.processes import TIMEOUT, contents
from tests.small_corpora import SEQUENCE_LENGTH, data_config, json_source, shard_rows, split_rows


def expected_records(corpus: Path, tokenizer: Path) -> tuple[dict[str, list], dict[str, list[str]]]:
    """Return the tokens of each split, in order, and the locations of dropped records by reason.

    This slow implementation is independent of the preparation.
    """
    encode_text = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model")).encode
    records: list[tuple[str, tuple[str, str], str]] = []
    splits: dict[str, list] = {}
    dropped: dict[str, list[str]] = {}

    def add(split: str, context: str, target: str, location: str) -> None:
        held_out = int(hashlib.sha256(target.encode()).hexdigest()[:16], 16) < 0.1 * 2**64
        records.append(("validation" if split == "train" and held_out else split, (context, target), location))

    for index in range(NUM_FILES):
        path = corpus.parent / f"{index}.jsonl"
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if not line:
                continue
            row, location = json.loads(line), f"{path}:{number}"
            if "messages" in row:
                add("train", "q", "SELECT a dog", location)
            elif row.get("text") == [3]:
                dropped.setdefault("malformed", []).append(location)
            elif row.keys() == {"text", "code"}:
                add("train", row["text"], row["code"], location)
            else:
                dropped.setdefault("one_sided" if "text" in row else "empty", []).append(location)
    for split, seed, count in (("train", 5, 200), ("test", 0, 50)):
        for index in range(count):
            add(split, *generate(seed, split, index), f"nlrx:{split}:{index}")
    kept: dict[tuple[str, str], str] = {}
    for split in ("test", "validation", "train"):
        for record_split, views, location in records:
            if record_split == split:
                kept.setdefault(views, location)
    for split, views, location in records:
        tokens = encode_text(views[0]), encode_text(views[1])
        if kept[views] != location:
            dropped.setdefault("duplicate", []).append(location)
        elif len(tokens[0]) + 2 * len(tokens[1]) + 16 > SEQUENCE_LENGTH:
            dropped.setdefault("too_long", []).append(location)
        else:
            splits.setdefault(split, []).append(tokens)
    return splits, dropped


def test_shards_match_an_independent_reading_of_the_sources(corpus, reference_corpus):
    manifest = json.loads((reference_corpus / "manifest.json").read_text())
    splits, dropped = expected_records(corpus, reference_corpus / "tokenizer")
    assert manifest["splits"].keys() == splits.keys() == {"train", "validation", "test"}
    for split, entry in manifest["splits"].items():
        assert [row for shard in entry["shards"] for row in shard_rows(reference_corpus, shard)] == splits[split]
        assert entry["records"] == len(splits[split])
        for view, name in enumerate(("text", "code")):
            lengths = [len(record[view]) for record in splits[split]]
            assert entry["tokens"][name] == sum(lengths) and entry["longest"][name] == max(lengths)
        assert entry["positions_needed"] == max(len(text) + 2 * len(code) + 16 for text, code in splits[split])
    assert {reason: drop["count"] for reason, drop in manifest["dropped"].items()} == {
        reason: len(locations) for reason, locations in dropped.items()
    }
    assert {
        reason: [location.partition(": ")[0] for location in drop["first"]]
        for reason, drop in manifest["dropped"].items()
    } == {reason: locations[:5] for reason, locations in dropped.items()}
    assert dropped.keys() == {"malformed", "empty", "one_sided", "duplicate", "too_long"}
    assert sum(map(len, splits.values())) + sum(map(len, dropped.values())) == NUM_FILES * 402 + 250, (
        "a record was lost"
    )


def test_the_manifest_lists_every_shard_with_its_size_and_checksum(reference_corpus):
    manifest = json.loads((reference_corpus / "manifest.json").read_text())
    shards = {shard["file"]: shard for entry in manifest["splits"].values() for shard in entry["shards"]}
    assert {path.name for path in reference_corpus.iterdir()} == {
        *shards,
        "manifest.json",
        "summary.md",
        "tokenizer",
        ".lock",
        ".modified.json",
    }
    for name, shard in shards.items():
        content = (reference_corpus / name).read_bytes()
        assert shard["bytes"] == len(content) and shard["sha256"] == hashlib.sha256(content).hexdigest()
    tokenizer = Tokenizer.load(reference_corpus / "tokenizer")
    assert manifest["tokenizer"] == {"sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}


def test_datasets_and_pandas_open_the_shards(corpus, reference_corpus, tmp_path):
    datasets = pytest.importorskip("datasets")
    expected = expected_records(corpus, reference_corpus / "tokenizer")[0]["test"]
    files = [
        str(reference_corpus / shard["file"])
        for shard in json.loads((reference_corpus / "manifest.json").read_text())["splits"]["test"]["shards"]
    ]
    loaded = datasets.load_dataset("arrow", data_files=files, cache_dir=str(tmp_path), split="train")
    assert list(zip(loaded["text"], loaded["code"], strict=True)) == expected
    frame = pandas.concat([pandas.read_feather(file) for file in files])
    assert [(list(text), list(code)) for text, code in zip(frame.text, frame.code, strict=True)] == expected


def test_any_number_of_processes_writes_the_same_bytes(corpus, reference_corpus, run, tmp_path):
    done = run(corpus, f"data.path={tmp_path}", "data.workers=3")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(reference_corpus)


def test_a_second_run_does_not_touch_any_file(corpus, reference_corpus, run):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in reference_corpus.rglob("*") if path.name != ".lock"}

    before = times()
    done = run(corpus, "data.workers=2", "data.lm_views=last")
    assert done.returncode == 0 and "is already prepared, nothing to do: train " in done.stdout
    assert times() == before


def test_a_run_reports_what_it_dropped(corpus, reference_corpus):
    log = (corpus.parent / "stdout.txt").read_text().splitlines()
    location = f"{corpus.parent / '0.jsonl'}:4: 'no code'"
    assert (
        "dropped 8 records as one_sided (a view holds no text; set data.missing_views=keep to keep the other views), "
        f"the first: {location}" in log
    )
    assert log[-6].startswith(f"prepared {reference_corpus}: train ")
    summary = (reference_corpus / "summary.md").read_text()
    assert (
        "8 as `one_sided`: a view holds no text; set data.missing_views=keep to keep the other views. The first:"
        f"\n\n    {location}\n" in summary
    )
    assert f"| 3 json {corpus.parent / '3.jsonl'} | train | 402 |" in summary


def test_a_large_unit_is_written_to_several_shards(write_jsonl, pairs, tmp_path, monkeypatch, capsys):
    source = json_source(write_jsonl(tmp_path / "a.jsonl", pairs(400)))
    other = json_source(write_jsonl(tmp_path / "b.jsonl", pairs(100, seed=1)))
    settings = {"validation_fraction": 0.2}
    prepare(data_config(tmp_path / "whole", source, other, **settings))
    monkeypatch.setattr(encode, "SHARD_TOKENS", 1500)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 2000)
    manifest = prepare(data_config(tmp_path / "cut", source, other, **settings))
    files = [entry["file"] for entry in manifest["splits"]["train"]["shards"]]
    assert files[:3] == ["train-00000.arrow", "train-00000.001.arrow", "train-00000.002.arrow"]
    assert files[-1].startswith("train-00001.")
    for split in ("train", "validation"):
        assert split_rows(tmp_path / "cut", split) == split_rows(tmp_path / "whole", split)
        assert all(sum(entry["tokens"].values()) < 3000 for entry in manifest["splits"][split]["shards"])
    verify(tmp_path / "cut", workers=1)
    assert capsys.readouterr().out.endswith("all valid\n")


def test_a_prepared_folder_refuses_changed_settings_and_content(write_jsonl, pairs, tmp_path):
    source = json_source(write_jsonl(tmp_path / "a.jsonl", pairs(300)))
    imported = {"tokenizer": {"path": str(tmp_path / "trained" / "tokenizer" / "tokenizer.model")}}
    prepare(data_config(tmp_path / "trained", source))
    prepare(data_config(tmp_path / "imported", source, **imported))
    before = contents(tmp_path / "trained")
    with pytest.raises(
        UserError, match=r"was prepared with a different data\.sequence_length and data\.validation_fraction; choose"
    ):
        prepare(data_config(tmp_path / "trained", source, sequence_length=64, validation_fraction=0.5))
    with pytest.raises(UserError, match=r"was prepared with a different data\.sources"):
        prepare(data_config(tmp_path / "trained", source | {"split": "test"}))
    model = Path(imported["tokenizer"]["path"])
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"was prepared with a different content of \S*tokenizer\.model; choose"):
        prepare(data_config(tmp_path / "imported", source, **imported))
    model.write_bytes(content)
    write_jsonl(tmp_path / "a.jsonl", pairs(301))
    with pytest.raises(UserError, match=r"was prepared with a different content of \S*a\.jsonl; choose"):
        prepare(data_config(tmp_path / "trained", source))
    assert contents(tmp_path / "trained") == before


def test_a_changed_local_data_set_is_detected_even_without_recorded_file_times(write_jsonl, pairs, tmp_path):
    (tmp_path / "set").mkdir()
    path = write_jsonl(tmp_path / "set" / "a.jsonl", pairs(100))
    config = data_config(tmp_path / "out", {"type": "hub", "path": str(tmp_path / "set")})
    prepare(config)
    (tmp_path / "out" / ".modified.json").write_text('{"half')
    assert prepare(config)["splits"]["train"]["records"] == 100
    write_jsonl(path, pairs(101))
    with pytest.raises(UserError, match=r"was prepared with a different content of \S*a\.jsonl"):
        prepare(config)


def test_an_imported_tokenizer_keeps_its_ids(write_jsonl, pairs, reference_corpus, tmp_path):
    source = json_source(write_jsonl(tmp_path / "a.jsonl", pairs(50)))
    for name, path in (
        ("folder", reference_corpus / "tokenizer"),
        ("model", reference_corpus / "tokenizer" / "tokenizer.model"),
    ):
        prepare(data_config(tmp_path / name, source, tokenizer={"path": str(path)}, sequence_length=512))
    rows = shard_rows(tmp_path / "folder", {"file": "train-00000.arrow"})
    assert rows == shard_rows(tmp_path / "model", {"file": "train-00000.arrow"})
    decode = Tokenizer.load(reference_corpus / "tokenizer").decode
    assert [{"text": decode(text), "code": decode(code)} for text, code in rows] == pairs(50)


def test_ids_beyond_uint16_are_written_correctly(write_jsonl, tmp_path):
    vocabulary = {f"w{index}": index for index in range(70_000)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = json_source(write_jsonl(tmp_path / "a.jsonl", [{"text": "w69999 w65536", "code": "w65535 w1"}]))
    manifest = prepare(data_config(tmp_path / "out", source, tokenizer={"path": str(tmp_path / "tokenizer.json")}))
    entry = manifest["splits"]["train"]["shards"][0]
    assert shard_rows(tmp_path / "out", entry) == [([69999, 65536], [65535, 1])]
    assert open_shard(tmp_path / "out", entry, ["text", "code"]).columns[0].values.dtype == np.uint32


def test_held_out_records_share_no_target_with_training_and_match_the_fraction(
    write_jsonl, pairs, reference_corpus, tmp_path
):
    rows = [row | {"text": f"{row['text']} {again}"} for row in pairs(1500) for again in (1, 2)]
    source = json_source(write_jsonl(tmp_path / "a.jsonl", rows))
    settings = {
        "tokenizer": {"path": str(reference_corpus / "tokenizer")},
        "validation_fraction": 0.2,
        "sequence_length": 512,
    }
    manifest = prepare(data_config(tmp_path / "out", source, **settings))
    targets = {
        split: [tuple(code) for _, code in shard_rows(tmp_path / "out", entry["shards"][0])]
        for split, entry in manifest["splits"].items()
    }
    assert not set(targets["train"]) & set(targets["validation"])
    assert len(targets["train"]) + len(targets["validation"]) == 3000
    assert abs(len(set(targets["validation"])) - 300) < 4 * (1500 * 0.2 * 0.8) ** 0.5  # four standard deviations


def test_only_training_sources_have_records_held_out(write_jsonl, pairs, reference_corpus, tmp_path):
    source = json_source(write_jsonl(tmp_path / "a.jsonl", pairs(100)), split="test")
    settings = {"tokenizer": {"path": str(reference_corpus / "tokenizer")}, "validation_fraction": 0.5}
    assert prepare(data_config(tmp_path / "out", source, **settings))["splits"].keys() == {"test"}


def test_targets_of_generated_splits_are_disjoint_in_the_shards(tmp_path):
    sources = [
        {"type": "nlrx", "split": split, "records": 400, "seed": seed}
        for seed, split in enumerate(("train", "validation", "test"))
    ]
    manifest = prepare(data_config(tmp_path, *sources, sequence_length=2048, deduplicate="none"))
    assert manifest["dropped"] == {}
    decode, targets = Tokenizer.load(tmp_path / "tokenizer").decode, {}
    for seed, (split, entry) in enumerate(manifest["splits"].items()):
        rows = [(decode(text), decode(code)) for shard in entry["shards"] for text, code in shard_rows(tmp_path, shard)]
        assert rows == [generate(seed, split, index) for index in range(400)]
        targets[split] = {code for _, code in rows}
    assert not targets["train"] & targets["validation"]
    assert not targets["test"] & (targets["train"] | targets["validation"])


@pytest.mark.parametrize("records", [1, PIECE_RECORDS, PIECE_RECORDS + 1])
def test_a_generated_source_has_the_requested_size(records):
    source = Nlrx(NlrxSource(type="nlrx", records=records, seed=9), ("text", "code"), "data.sources.0")
    pieces = source.pieces()
    assert sum(piece.stop - piece.start for piece in pieces) == records
    last = list(source.read(pieces[-1]))[-1]
    assert last.views == generate(9, "train", records - 1)
    assert source.place(pieces[-1], last.position, 0) == f"nlrx:train:{records - 1}"


def test_no_process_of_a_preparation_imports_torch(corpus, command, tmp_path):
    """Put a fake `torch` first on the import path, also for workers. When imported, it writes a marker file."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os\nopen(os.environ['MARKER'], 'w').close()\n")
    sources = [json_source(corpus.parent / "0.jsonl"), {"type": "nlrx", "records": 5}]
    arguments, environment = command(corpus, f"data.path={tmp_path / 'out'}", f"data.sources={json.dumps(sources)}")
    environment |= {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}",
        "MARKER": str(tmp_path / "marker"),
    }
    subprocess.run(arguments, env=environment, check=True, capture_output=True, timeout=TIMEOUT)
    assert (tmp_path / "out" / "manifest.json").exists() and not (tmp_path / "marker").exists()
    subprocess.run([sys.executable, "-c", "import torch"], env=environment, check=True)
    assert (tmp_path / "marker").exists(), "the fake torch should write the marker"
