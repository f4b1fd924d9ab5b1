"""The preparation as a whole: right shards, the same for any number of processes and any interruption, nothing lost unseen."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import psutil
import pytest
import sentencepiece
import tokenizers

from data_prep import encode, units
from data_prep.config import NlrxSource
from data_prep.console import UserError
from data_prep.nlrx_grammar import generate
from data_prep.pipeline import prepare
from data_prep.shards import open_shard
from data_prep.sources.nlrx import PIECE_RECORDS, Nlrx
from data_prep.tokenizer import Tokenizer
from data_prep.tools.verify import verify
from tests.preparing import SEQUENCE_LENGTH, VOCAB_SIZE, data, json_source, quiet, shard_rows, split_rows
from tests.processes import contents, processes_of_session, wait_for

FILES = 8
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, lines_file, pairs) -> Path:
    """A configuration of many units (a source is one at least), with every reason for dropping a record."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(FILES):
        rows = pairs(400, seed=index)
        rows[3] = {"text": "no code"}
        rows[5] = {"text": "long", "code": "SELECT name " * 200}
        rows[7 + index] = {"other": "column"}
        lines_file(folder / f"{index}.jsonl", rows)
        with open(folder / f"{index}.jsonl", "a", encoding="utf-8") as file:
            file.write('\n{"text": 3, "code": "x"}\n{"messages": [{"role": "user", "content": "q"}, '
                       '{"role": "assistant", "content": "SELECT a dog"}]}')
    sources = [json_source(folder / f"{index}.jsonl") for index in range(FILES)]
    sources += [{"type": "nlrx", "records": 200, "seed": 5}, {"type": "nlrx", "records": 50, "split": "test"}]
    path = folder / "run.yaml"
    path.write_text(json.dumps({"name": "x", "data": {
        "path": str(folder / "out"), "sources": sources, "tokenizer": {"vocab_size": VOCAB_SIZE}, "on_malformed": "drop",
        "sequence_length": SEQUENCE_LENGTH, "validation_fraction": 0.1, "workers": 1}}))
    return path


@pytest.fixture(scope="session")
def undisturbed(corpus, run) -> Path:
    """The corpus, prepared by one process."""
    done = run(corpus)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (corpus.parent / "said").write_text(done.stdout)
    return corpus.parent / "out"


def expected_records(corpus: Path, tokenizer: Path) -> tuple[dict[str, list], dict[str, list[str]]]:
    """The corpus once more, slowly: the tokens of each split in order, and the places of each reason for dropping."""
    encode = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model")).encode
    records: list[tuple[str, tuple[str, str], str]] = []
    splits: dict[str, list] = {}
    dropped: dict[str, list[str]] = {}

    def add(split: str, context: str, target: str, place: str) -> None:
        held_out = int(hashlib.sha256(target.encode()).hexdigest()[:16], 16) < 0.1 * 2**64
        records.append(("validation" if split == "train" and held_out else split, (context, target), place))

    for index in range(FILES):
        path = corpus.parent / f"{index}.jsonl"
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if not line:
                continue
            row, place = json.loads(line), f"{path}:{number}"
            if "messages" in row:
                add("train", "q", "SELECT a dog", place)
            elif row.get("text") == 3:
                dropped.setdefault("malformed", []).append(place)
            elif row.keys() == {"text", "code"}:
                add("train", row["text"], row["code"], place)
            else:
                dropped.setdefault("one_sided" if "text" in row else "empty", []).append(place)
    for split, seed, count in (("train", 5, 200), ("test", 0, 50)):
        for index in range(count):
            add(split, *generate(seed, split, index), f"nlrx:{split}:{index}")
    kept: dict[tuple[str, str], str] = {}
    for split in ("test", "validation", "train"):
        for own, views, place in records:
            if own == split:
                kept.setdefault(views, place)
    for split, views, place in records:
        tokens = encode(views[0]), encode(views[1])
        if kept[views] != place:
            dropped.setdefault("duplicate", []).append(place)
        elif len(tokens[0]) + 2 * len(tokens[1]) + 16 > SEQUENCE_LENGTH:
            dropped.setdefault("too_long", []).append(place)
        else:
            splits.setdefault(split, []).append(tokens)
    return splits, dropped


def test_the_shards_hold_the_records_of_the_sources_as_a_second_reader_finds_them(corpus, undisturbed):
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    splits, dropped = expected_records(corpus, undisturbed / "tokenizer")
    assert manifest["splits"].keys() == splits.keys() == {"train", "validation", "test"}
    for split, entry in manifest["splits"].items():
        assert [row for shard in entry["shards"] for row in shard_rows(undisturbed, shard)] == splits[split]
        assert entry["records"] == len(splits[split])
        for view, name in enumerate(("text", "code")):
            lengths = [len(record[view]) for record in splits[split]]
            assert entry["tokens"][name] == sum(lengths) and entry["longest"][name] == max(lengths)
        assert entry["positions_needed"] == max(len(text) + 2 * len(code) + 16 for text, code in splits[split])
    assert {reason: drop["count"] for reason, drop in manifest["dropped"].items()} == {
        reason: len(places) for reason, places in dropped.items()}
    assert {reason: [place.partition(": ")[0] for place in drop["first"]] for reason, drop in manifest["dropped"].items()} == {
        reason: places[:5] for reason, places in dropped.items()}
    assert dropped.keys() == {"malformed", "empty", "one_sided", "duplicate", "too_long"}
    assert sum(map(len, splits.values())) + sum(map(len, dropped.values())) == FILES * 402 + 250, "a record is lost"


def test_the_manifest_lists_every_shard_with_its_size_and_checksum(undisturbed):
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    shards = {shard["file"]: shard for entry in manifest["splits"].values() for shard in entry["shards"]}
    assert {path.name for path in undisturbed.iterdir()} == {*shards, "manifest.json", "summary.md", "tokenizer", ".lock", ".modified.json"}
    for name, shard in shards.items():
        content = (undisturbed / name).read_bytes()
        assert shard["bytes"] == len(content) and shard["sha256"] == hashlib.sha256(content).hexdigest()
    tokenizer = Tokenizer.load(undisturbed / "tokenizer")
    assert manifest["tokenizer"] == {"sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}


def test_datasets_and_pandas_open_the_shards(corpus, undisturbed, tmp_path):
    datasets = pytest.importorskip("datasets")
    expected = expected_records(corpus, undisturbed / "tokenizer")[0]["test"]
    files = [str(undisturbed / shard["file"])
             for shard in json.loads((undisturbed / "manifest.json").read_text())["splits"]["test"]["shards"]]
    loaded = datasets.load_dataset("arrow", data_files=files, cache_dir=str(tmp_path), split="train")
    assert list(zip(loaded["text"], loaded["code"], strict=True)) == expected
    frame = pandas.concat([pandas.read_feather(file) for file in files])
    assert [(list(text), list(code)) for text, code in zip(frame.text, frame.code, strict=True)] == expected


def test_any_number_of_processes_writes_the_same_bytes(corpus, undisturbed, run, tmp_path):
    done = run(corpus, f"data.path={tmp_path}", "data.workers=3")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(undisturbed)


@pytest.mark.skipif(not MPIRUN, reason="there is no mpirun")
def test_ranks_of_mpirun_write_the_same_bytes_and_go_on_after_a_kill(corpus, undisturbed, command, run, tmp_path):
    arguments, environment = command(corpus, f"data.path={tmp_path}")
    with open(tmp_path / ".log", "w") as log:
        process = subprocess.Popen([MPIRUN, "-n", "3", *arguments], env=environment, start_new_session=True, stdout=log, stderr=log)
    wait_for(lambda: len(list(tmp_path.glob(".partial/scan/*.json"))) > 1)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "data_prep" in child.cmdline()]
    ranks[-1].kill()
    assert process.wait(timeout=60) != 0 and not psutil.wait_procs(ranks, timeout=10)[1], "ranks outlive one of them"
    assert not (tmp_path / "manifest.json").exists()
    (tmp_path / ".log").unlink()
    done = subprocess.run([MPIRUN, "-n", "3", *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "in 3 MPI ranks" in done.stdout and done.stdout.count("going on with an interrupted preparation") == 1
    assert contents(tmp_path) == contents(undisturbed)
    again = subprocess.run([MPIRUN, "-n", "2", *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and again.stdout.count("is prepared already") == 1


@pytest.mark.skipif(not MPIRUN, reason="there is no mpirun")
def test_a_mistake_under_mpirun_is_one_line(corpus, command, lines_file, tmp_path):
    bad = lines_file(tmp_path / "bad.jsonl", [3])
    for sources, expected in (([json_source(bad)] * 2, f"{bad}:1: a JSON int, not an object"), ([json_source("absent")], "cannot read absent")):
        arguments, environment = command(corpus, f"data.path={tmp_path / 'out'}", "data.on_malformed=fail", f"data.sources={json.dumps(sources)}")
        done = subprocess.run([MPIRUN, "-n", "2", *arguments], env=environment, capture_output=True, text=True, timeout=120)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and expected in errors[0] and "Traceback" not in done.stderr, done.stderr


def test_a_second_run_touches_nothing(corpus, undisturbed, run):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.name != ".lock"}
    before = times()
    done = run(corpus, "data.workers=2", "data.lm_views=last")
    assert done.returncode == 0 and "is prepared already, nothing to do: train " in done.stdout
    assert times() == before


def test_a_run_tells_what_it_dropped(corpus, undisturbed):
    said = (corpus.parent / "said").read_text().splitlines()
    place = f"{corpus.parent / '0.jsonl'}:4: 'no code'"
    assert f"dropped 8 records as one_sided (a view holds no text; data.missing_views: keep takes the others), the first: {place}" in said
    assert said[-6].startswith(f"prepared {undisturbed}: train ")
    summary = (undisturbed / "summary.md").read_text()
    assert f"8 as `one_sided`: a view holds no text; data.missing_views: keep takes the others. The first:\n\n    {place}\n" in summary
    assert f"| 3 json {corpus.parent / '3.jsonl'} | train | 402 |" in summary


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(corpus, undisturbed, command, run, tmp_path):
    units = FILES + 2
    partial = tmp_path / ".partial"

    def reports(phase: str) -> int:
        return len(list((partial / phase).glob("[0-9]*[0-9].json")))

    moments = [lambda: (partial / "settings.json").exists(), lambda: reports("scan") > 0, lambda: reports("scan") == units,
               lambda: (partial / "duplicate" / "00000.npy").exists(), lambda: (partial / "tokenizer").exists(),
               lambda: (tmp_path / "tokenizer").exists(), lambda: any(tmp_path.glob(".*.arrow.*.tmp")),
               lambda: reports("shards") >= units // 2, lambda: reports("shards") >= units - 1, lambda: (tmp_path / "manifest.json").exists()]
    killed, written = 0, {}
    for moment in moments:
        arguments, environment = command(corpus, f"data.path={tmp_path}")
        with open(tmp_path / ".log", "w") as log:
            process = subprocess.Popen(arguments, env=environment, start_new_session=True, stdout=log, stderr=log)
        wait_for(lambda process=process, moment=moment: moment() or process.poll() is not None)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        wait_for(lambda process=process: not processes_of_session(process.pid))
        assert all(shard.read_bytes() == (undisturbed / shard.name).read_bytes() for shard in tmp_path.glob("*.arrow"))
        for report in [*partial.glob("scan/*.json"), *partial.glob("shards/*.json")]:
            shards = itertools.chain.from_iterable(json.loads(report.read_text()).get("shards", {}).values())
            for file in [report, *(tmp_path / shard["file"] for shard in shards)]:
                assert written.setdefault(file, file.stat().st_mtime_ns) == file.stat().st_mtime_ns, "made again"
    assert killed >= len(moments) - 2, "the last ones may have come too late, the others not"
    (tmp_path / ".log").unlink()
    (tmp_path / ".train-00000.arrow.1.tmp").write_bytes(b"what a killed worker leaves")
    done = run(corpus, f"data.path={tmp_path}", "data.workers=2")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(undisturbed)
    shards = {file: at for file, at in written.items() if file.suffix == ".arrow"}
    assert len(shards) >= units and all(file.stat().st_mtime_ns == at for file, at in shards.items())


@pytest.fixture
def busy(corpus, undisturbed, command, tmp_path):
    """A preparation with many units before it, two workers, and a first unit behind it."""
    large = tmp_path.parent / f"{tmp_path.name}.jsonl"
    large.write_text((corpus.parent / "0.jsonl").read_text() * 20)
    sources = [json_source(large)] * 100
    tokenizer = undisturbed / "tokenizer"
    arguments, environment = command(corpus, f"data.path={tmp_path}", "data.workers=2", f"data.sources={json.dumps(sources)}",
                                     f"data.tokenizer={{path: {tokenizer}}}", "data.deduplicate=none")
    process = subprocess.Popen(arguments, env=environment, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any(tmp_path.glob(".partial/shards/*.json")) or process.poll() is not None)
    yield process
    for pid in processes_of_session(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def workers_of(process: subprocess.Popen) -> list[int]:
    parents = processes_of_session(process.pid)
    return [pid for pid, parent in parents.items() if parents.get(parent) == process.pid]  # below the fork server


def test_workers_end_with_the_process_that_prepares(busy):
    assert workers_of(busy)
    busy.kill()
    busy.wait()
    wait_for(lambda: not processes_of_session(busy.pid), seconds=10)


def test_a_killed_worker_is_one_clear_line(busy):
    os.kill(workers_of(busy)[0], signal.SIGKILL)
    _, said = busy.communicate(timeout=60)
    assert busy.returncode == 2
    assert said.startswith("error: a worker process of the preparation was killed") and said.count("\n") == 1, said


@pytest.mark.parametrize("to_all", [True, False], ids=["at the terminal", "to the process alone"])
def test_ctrl_c_ends_it_at_once_in_one_line(busy, to_all):
    (os.killpg if to_all else os.kill)(busy.pid, signal.SIGINT)
    _, said = busy.communicate(timeout=20)
    assert (busy.returncode, said) == (130, "interrupted\n")
    wait_for(lambda: not processes_of_session(busy.pid), seconds=10)


@pytest.mark.parametrize("changed, message", [
    (lambda content: content.replace(b"}\n{", b"} {", 1), "a.jsonl changed while it was prepared; start again when nothing writes to it"),
    (lambda content: content.replace(b"SELECT", b"select", 1), "a file of the sources changed while the corpus was prepared"),
    (lambda content: content[:-30], "a.jsonl has become shorter while it was prepared"),
])
def test_a_file_that_is_written_meanwhile_is_found_out(lines_file, pairs, tmp_path, changed, message):
    path = lines_file(tmp_path / "a.jsonl", pairs(300))

    def change(line: str) -> None:
        if line.startswith("tokenizing"):
            path.write_bytes(changed(path.read_bytes()))

    with pytest.raises(UserError, match=message):
        prepare(data(tmp_path / "out", json_source(path)), say=change)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_unit_with_much_text_makes_several_shards(lines_file, pairs, tmp_path, monkeypatch):
    source = json_source(lines_file(tmp_path / "a.jsonl", pairs(400)))
    other = json_source(lines_file(tmp_path / "b.jsonl", pairs(100, seed=1)))
    settings = {"validation_fraction": 0.2}
    quiet(data(tmp_path / "whole", source, other, **settings))
    monkeypatch.setattr(encode, "SHARD_TOKENS", 1500)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 2000)
    manifest = quiet(data(tmp_path / "cut", source, other, **settings))
    files = [entry["file"] for entry in manifest["splits"]["train"]["shards"]]
    assert files[:3] == ["train-00000.arrow", "train-00000.001.arrow", "train-00000.002.arrow"] and files[-1].startswith("train-00001.")
    for split in ("train", "validation"):
        assert split_rows(tmp_path / "cut", split) == split_rows(tmp_path / "whole", split)
        assert all(sum(entry["tokens"].values()) < 3000 for entry in manifest["splits"][split]["shards"])
    said = []
    verify(tmp_path / "cut", said.append, workers=1)
    assert said[-1].endswith("all sound")


def test_a_malformed_line_far_inside_a_file_is_named_without_counting_all_before_it(lines_file, pairs, tmp_path, monkeypatch, cut_small):
    path = lines_file(tmp_path / "a.jsonl", [*pairs(300), 3, *pairs(300, seed=1)])
    cut_small(2000)
    message = r"a\.jsonl:301: a JSON int, not an object"
    for counted in (units.COUNTED_BYTES, 2000):
        monkeypatch.setattr(units, "COUNTED_BYTES", counted)
        with pytest.raises(UserError, match=message) as raised:
            quiet(data(tmp_path / str(counted), json_source(path)))
        message = r"a\.jsonl, line ([\d,]+) behind byte ([\d,]+): a JSON int, not an object"
    line, byte = (int(number.replace(",", "")) for number in re.search(message, str(raised.value)).groups())
    assert path.read_bytes()[byte:].split(b"\n", 1)[1 if byte else 0].split(b"\n")[line - 1] == b"3"


def test_other_settings_start_an_interrupted_run_afresh(lines_file, pairs, tmp_path):
    good = json_source(lines_file(tmp_path / "good.jsonl", pairs(300)))
    bad = json_source(lines_file(tmp_path / "bad.jsonl", [*pairs(5, seed=1), {"text": 3}]))
    tokenizer = data(tmp_path / "first", good).tokenizer
    quiet(data(tmp_path / "first", good))
    taken = {"path": str(tmp_path / "first" / "tokenizer")}
    with pytest.raises(UserError, match=r"bad\.jsonl:6: 'text' holds a value of type int, not text; mend the line, or .*on_malformed=drop"):
        quiet(data(tmp_path / "out", good, good, bad, tokenizer=taken))
    assert any((tmp_path / "out").glob(".partial/scan/*.json")) and not (tmp_path / "out" / "manifest.json").exists()
    said = []
    settings = {"tokenizer": tokenizer.model_dump(exclude_none=True) | {"vocab_size": VOCAB_SIZE - 10}, "sequence_length": 64}
    prepare(data(tmp_path / "out", good, **settings), say=said.append)
    assert "the interrupted preparation had other settings: starting afresh" in said
    quiet(data(tmp_path / "fresh", good, **settings))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_remains_of_unknown_origin_are_neither_used_nor_removed(lines_file, pairs, tmp_path):
    source = json_source(lines_file(tmp_path / "a.jsonl", pairs(300)))
    quiet(data(tmp_path / "out", source))
    (tmp_path / "out" / "manifest.json").unlink()
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"no manifest\.json that says what of; remove that folder"):
        quiet(data(tmp_path / "out", source, tokenizer={"vocab_size": VOCAB_SIZE - 10}))
    assert contents(tmp_path / "out") == before


def test_a_prepared_folder_refuses_other_settings_and_other_content(lines_file, pairs, tmp_path):
    source = json_source(lines_file(tmp_path / "a.jsonl", pairs(300)))
    taken = {"tokenizer": {"path": str(tmp_path / "trained" / "tokenizer" / "tokenizer.model")}}
    quiet(data(tmp_path / "trained", source))
    quiet(data(tmp_path / "taken", source, **taken))
    before = contents(tmp_path / "trained")
    with pytest.raises(UserError, match=r"was prepared with another data\.sequence_length and data\.validation_fraction; choose"):
        quiet(data(tmp_path / "trained", source, sequence_length=64, validation_fraction=0.5))
    with pytest.raises(UserError, match=r"was prepared with another data\.sources"):
        quiet(data(tmp_path / "trained", source | {"split": "test"}))
    model = Path(taken["tokenizer"]["path"])
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"was prepared with another content of \S*tokenizer\.model; choose"):
        quiet(data(tmp_path / "taken", source, **taken))
    model.write_bytes(content)
    lines_file(tmp_path / "a.jsonl", pairs(301))
    with pytest.raises(UserError, match=r"was prepared with another content of \S*a\.jsonl; choose"):
        quiet(data(tmp_path / "trained", source))
    assert contents(tmp_path / "trained") == before


def test_a_local_folder_of_a_data_set_is_watched_and_a_lost_note_of_times_costs_only_time(lines_file, pairs, tmp_path):
    (tmp_path / "set").mkdir()
    path = lines_file(tmp_path / "set" / "a.jsonl", pairs(100))
    config = data(tmp_path / "out", {"type": "hub", "path": str(tmp_path / "set")})
    quiet(config)
    (tmp_path / "out" / ".modified.json").write_text('{"half')
    assert quiet(config)["splits"]["train"]["records"] == 100
    lines_file(path, pairs(101))
    with pytest.raises(UserError, match=r"was prepared with another content of \S*a\.jsonl"):
        quiet(config)


def test_two_runs_do_not_prepare_one_folder_at_once(corpus, mistake, tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert mistake(corpus, f"data.path={tmp_path}").startswith(f"another process is preparing {tmp_path}; wait for it")


def test_a_tokenizer_is_taken_over_with_its_ids(lines_file, pairs, undisturbed, tmp_path):
    source = json_source(lines_file(tmp_path / "a.jsonl", pairs(50)))
    for name, given in (("folder", undisturbed / "tokenizer"), ("model", undisturbed / "tokenizer" / "tokenizer.model")):
        quiet(data(tmp_path / name, source, tokenizer={"path": str(given)}, sequence_length=512))
    rows = shard_rows(tmp_path / "folder", {"file": "train-00000.arrow"})
    assert rows == shard_rows(tmp_path / "model", {"file": "train-00000.arrow"})
    decode = Tokenizer.load(undisturbed / "tokenizer").decode
    assert [{"text": decode(text), "code": decode(code)} for text, code in rows] == pairs(50)


def test_a_vocabulary_beyond_uint16_is_written_whole(lines_file, tmp_path):
    vocabulary = {f"w{index}": index for index in range(70_000)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = json_source(lines_file(tmp_path / "a.jsonl", [{"text": "w69999 w65536", "code": "w65535 w1"}]))
    manifest = quiet(data(tmp_path / "out", source, tokenizer={"path": str(tmp_path / "tokenizer.json")}))
    entry = manifest["splits"]["train"]["shards"][0]
    assert shard_rows(tmp_path / "out", entry) == [([69999, 65536], [65535, 1])]
    assert open_shard(tmp_path / "out", entry, ["text", "code"]).columns[0].values.dtype == np.uint32


def test_held_out_records_share_no_target_with_training_and_have_about_their_share(lines_file, pairs, undisturbed, tmp_path):
    rows = [row | {"text": f"{row['text']} {again}"} for row in pairs(1500) for again in (1, 2)]
    source = json_source(lines_file(tmp_path / "a.jsonl", rows))
    settings = {"tokenizer": {"path": str(undisturbed / "tokenizer")}, "validation_fraction": 0.2, "sequence_length": 512}
    manifest = quiet(data(tmp_path / "out", source, **settings))
    targets = {split: [tuple(code) for _, code in shard_rows(tmp_path / "out", entry["shards"][0])]
               for split, entry in manifest["splits"].items()}
    assert not set(targets["train"]) & set(targets["validation"])
    assert len(targets["train"]) + len(targets["validation"]) == 3000
    assert abs(len(set(targets["validation"])) - 300) < 4 * (1500 * 0.2 * 0.8) ** 0.5  # four standard deviations


def test_only_training_sources_are_held_out_from(lines_file, pairs, undisturbed, tmp_path):
    source = json_source(lines_file(tmp_path / "a.jsonl", pairs(100)), split="test")
    settings = {"tokenizer": {"path": str(undisturbed / "tokenizer")}, "validation_fraction": 0.5}
    assert quiet(data(tmp_path / "out", source, **settings))["splits"].keys() == {"test"}


def test_the_generated_splits_are_disjoint_by_target_in_the_shards(tmp_path):
    sources = [{"type": "nlrx", "split": split, "records": 400, "seed": seed}
               for seed, split in enumerate(("train", "validation", "test"))]
    manifest = quiet(data(tmp_path, *sources, sequence_length=2048, deduplicate="none"))
    assert manifest["dropped"] == {}
    decode, targets = Tokenizer.load(tmp_path / "tokenizer").decode, {}
    for seed, (split, entry) in enumerate(manifest["splits"].items()):
        rows = [(decode(text), decode(code)) for shard in entry["shards"] for text, code in shard_rows(tmp_path, shard)]
        assert rows == [generate(seed, split, index) for index in range(400)]
        targets[split] = {code for _, code in rows}
    assert not targets["train"] & targets["validation"] and not targets["test"] & (targets["train"] | targets["validation"])


@pytest.mark.parametrize("records", [1, PIECE_RECORDS, PIECE_RECORDS + 1])
def test_a_generated_source_has_the_size_asked_for(records):
    source = Nlrx(NlrxSource(type="nlrx", records=records, seed=9), ("text", "code"), "data.sources.0")
    pieces = source.pieces()
    assert sum(piece.stop - piece.start for piece in pieces) == records
    last = list(source.read(pieces[-1]))[-1]
    assert last.views == generate(9, "train", records - 1)
    assert source.place(pieces[-1], last.position, 0) == f"nlrx:train:{records - 1}"


@pytest.mark.parametrize("rows, settings, expected", [
    ([{"question": "a", "answer": "b"}], {}, r"no record is left: 1 empty \(no view holds text; the first: .*a\.jsonl:1: ''\); check data\.views"),
    ([{"text": "a b"}, {"text": "  ", "code": "\n"}], {}, r"1 empty \(.*a\.jsonl:2: ''\); 1 one_sided \(.*a\.jsonl:1: 'a b'\)"),
    ([{"text": "a", "code": "b"}], {"sequence_length": 8}, r"1 too_long \(.*a\.jsonl:1: needs data\.sequence_length=19: 'a \| b'\)"),
    ([[], 3], {"on_malformed": "drop"}, r"2 malformed \(.*a\.jsonl:1: a JSON list, not an object\)"),
    ([], {}, "no record is left: the sources hold no line"),
    ([{"question": "a", "answer": "b"}], {"tokenizer": {"vocab_size": 400}}, r"no record is left: 1 empty .*a\.jsonl:1: ''\); check data\.views"),
    ([], {"tokenizer": {"vocab_size": 400}}, "the sources hold no line"),
    ([3], {"tokenizer": {"vocab_size": 400}}, r"a\.jsonl:1: a JSON int, not an object"),
])
def test_a_corpus_of_which_nothing_is_left_is_an_error(lines_file, undisturbed, tmp_path, rows, settings, expected):
    source = json_source(lines_file(tmp_path / "a.jsonl", rows))
    with pytest.raises(UserError, match=expected) as raised:
        quiet(data(tmp_path / "out", source, **({"tokenizer": {"path": str(undisturbed / "tokenizer")}} | settings)))
    assert "\n" not in str(raised.value) and not (tmp_path / "out" / "manifest.json").exists()


def test_mistakes_in_the_data_end_the_command_in_one_line(corpus, undisturbed, mistake, lines_file, pairs, tmp_path):
    def with_file(path, *more: str) -> str:
        return mistake(corpus, f"data.path={tmp_path / 'out'}", f"data.sources.0.path={path}", "data.on_malformed=fail", *more)

    absent = tmp_path / "absent.jsonl"
    assert with_file(absent) == f"cannot read {absent} (data.sources.0.path): No such file or directory"
    assert with_file("").startswith("data.sources.0.path is not set")
    assert "holds no file that ends in .json, " in with_file(tmp_path)
    # Several units, so that a progress bar would show, and other workers are busy when one fails.
    bad = lines_file(tmp_path / "bad.jsonl", pairs(9))
    with bad.open("a") as file:
        file.write('{"text": "a", "code"\n')
    taken = f"data.tokenizer={{path: {undisturbed / 'tokenizer'}}}"
    message = with_file(bad, taken, "data.workers=2", f"data.sources={json.dumps([json_source(bad)] * 3)}")
    assert message.startswith(f"{bad}:10: not JSON (Expecting ':' delimiter")
    good = lines_file(tmp_path / "good.jsonl", pairs(9))
    assert with_file(good, "data.tokenizer={path: nowhere}", f"data.sources={json.dumps([json_source(good)])}").startswith(
        "nowhere: no tokenizer there")
    assert "data.sources is empty" in with_file(bad, "data.sources=[]")


def test_a_folder_that_cannot_be_written_is_one_clear_line(corpus, mistake, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write the corpus" in mistake(corpus, f"data.path={tmp_path / 'file'}")

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as a full disk would

    message = mistake(corpus, f"data.path={tmp_path / 'out'}", preexec_fn=limit_file_size)
    assert message.startswith(f"cannot write the corpus to {tmp_path / 'out'}: ") and "File too large" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_one_clear_line(corpus, mistake, lines_file, pairs, tmp_path):
    path = lines_file(tmp_path / "a.jsonl", pairs(3))
    path.chmod(0)
    assert "Permission denied" in mistake(corpus, f"data.path={tmp_path / 'out'}", f"data.sources.0.path={path}")


def test_no_process_of_a_preparation_imports_torch(corpus, command, tmp_path):
    """A `torch` that leaves a mark stands first on the path, of the workers too."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os\nopen(os.environ['MARK'], 'w').close()\n")
    sources = [json_source(corpus.parent / "0.jsonl"), {"type": "nlrx", "records": 5}]
    arguments, environment = command(corpus, f"data.path={tmp_path / 'out'}", f"data.sources={json.dumps(sources)}")
    environment |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}", "MARK": str(tmp_path / "mark")}
    subprocess.run(arguments, env=environment, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "out" / "manifest.json").exists() and not (tmp_path / "mark").exists()
    subprocess.run([sys.executable, "-c", "import torch"], env=environment, check=True)
    assert (tmp_path / "mark").exists(), "the mark would not have shown"


@pytest.mark.parametrize("name", ["continues", "checksum", "../x", "", "a b", "1st"])
def test_a_view_cannot_have_the_name_of_another_column_or_of_no_column(tmp_path, name):
    with pytest.raises(UserError, match=rf"data\.views: .*{re.escape(repr(name))} cannot be the name of a view"):
        data(tmp_path, views=[name, "code"])


def test_a_source_of_which_nothing_is_kept_is_told(lines_file, pairs, tmp_path):
    sources = [json_source(lines_file(tmp_path / "a.jsonl", pairs(50))),
               json_source(lines_file(tmp_path / "b.jsonl", pairs(9)), views={"text": "txet", "code": "code"})]
    said = []
    prepare(data(tmp_path / "out", *sources), say=said.append)
    assert "WARNING: nothing is kept of data.sources.1, 9 records: look at its columns and at summary.md" in said


def test_a_tokenizer_that_does_not_give_texts_back_is_told_and_one_that_is_none_before_the_scan(lines_file, pairs, tmp_path):
    source = json_source(lines_file(tmp_path / "a.jsonl", pairs(50)))
    for name, normalizer in (("lower", tokenizers.normalizers.Lowercase()), ("whole", None)):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
        if normalizer:
            tokenizer.normalizer = normalizer
        tokenizer.train_from_iterator(["select all"] * 9, tokenizers.trainers.BpeTrainer(
            vocab_size=300, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        tokenizer.save(str(tmp_path / f"{name}.json"))
        said = []
        prepare(data(tmp_path / name, source, tokenizer={"path": str(tmp_path / f"{name}.json")}, sequence_length=512), say=said.append)
        warned = [line for line in said if line.startswith("WARNING: the tokenizer")]
        assert len(warned) == (name == "lower") and all("does not give back 50 of 100 texts" in line and "'SELECT " in line for line in warned)
    said = []
    with pytest.raises(UserError, match="no tokenizer there"):
        prepare(data(tmp_path / "none", source, tokenizer={"path": str(tmp_path / "absent")}), say=said.append)
    assert not any(line.startswith("scanning") for line in said)
