"""Tests of interrupted preparations: they resume and write the same bytes, or report why they cannot."""

import contextlib
import fcntl
import itertools
import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from data_prep.pipeline import prepare
from data_prep.utils.console import UserError
from tests.data_prep.conftest import MPIRUN, NUM_FILES, REPO_ROOT, needs_mpi
from tests.processes import TIMEOUT, contents, processes_of_session, wait_for
from tests.small_corpora import VOCAB_SIZE, data_config, json_source

PAUSE_HOOK = """
import glob, os, sys, time

FILE_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "shutil.rmtree")

def pause(event, arguments):
    count, pattern = os.environ["PAUSE_AT"].split(":", 1)
    if event in FILE_EVENTS and len(glob.glob(pattern)) >= int(count):
        time.sleep(3600)

sys.addaudithook(pause)
"""
"""Source of a sitecustomize module that pauses a process.

Once enough files match a pattern, the process sleeps before its next file operation.
"""


@pytest.fixture
def pause_at(tmp_path_factory):
    """Function that returns environment variables that pause a preparation once `count` files match a pattern."""
    folder = tmp_path_factory.mktemp("pause")
    (folder / "sitecustomize.py").write_text(PAUSE_HOOK)
    return lambda pattern, count: {"PYTHONPATH": f"{folder}{os.pathsep}{REPO_ROOT}", "PAUSE_AT": f"{count}:{pattern}"}


@needs_mpi
def test_mpi_ranks_write_the_same_bytes_and_resume_after_a_kill(
    corpus, reference_corpus, command, run, pause_at, tmp_path
):
    arguments, environment = command(corpus, f"data.path={tmp_path}")
    with open(tmp_path / ".log", "w") as log:
        process = subprocess.Popen(
            [MPIRUN, "-n", "3", *arguments],
            env=environment | pause_at(tmp_path / ".partial/scan/*.json", 2),
            start_new_session=True,
            stdout=log,
            stderr=log,
        )
    wait_for(lambda: len(list(tmp_path.glob(".partial/scan/*.json"))) > 1)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "data_prep" in child.cmdline()]
    ranks[-1].kill()
    assert process.wait(timeout=TIMEOUT) != 0 and not psutil.wait_procs(ranks, timeout=TIMEOUT)[1], (
        "ranks have outlived a killed rank"
    )
    assert not (tmp_path / "manifest.json").exists()
    (tmp_path / ".log").unlink()
    done = subprocess.run(
        [MPIRUN, "-n", "3", *arguments], env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    assert "in 3 MPI ranks" in done.stdout and done.stdout.count("resuming an interrupted preparation") == 1
    assert contents(tmp_path) == contents(reference_corpus)
    again = subprocess.run(
        [MPIRUN, "-n", "2", *arguments], env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert again.returncode == 0 and again.stdout.count("is already prepared") == 1


def test_repeated_kills_leave_the_same_bytes(corpus, reference_corpus, command, run, pause_at, tmp_path):
    units = NUM_FILES + 2  # the fixture `corpus` also has two sources of type nlrx
    partial = tmp_path / ".partial"
    scans, reports = (f".partial/{phase}/[0-9]*[0-9].json" for phase in ("scan", "shards"))
    pause_points = [
        (".partial/settings.json", 1),
        (scans, 1),
        (scans, units),
        (".partial/duplicate/00000.npy", 1),
        (".partial/tokenizer", 1),
        ("tokenizer", 1),
        (".*.arrow.*.tmp", 1),
        (reports, units // 2),
        (reports, units - 1),
        ("manifest.json", 1),
    ]
    killed = 0
    written_at: dict[Path, int] = {}
    for pattern, count in pause_points:
        arguments, environment = command(corpus, f"data.path={tmp_path}")
        with open(tmp_path / ".log", "w") as log:
            process = subprocess.Popen(
                arguments,
                env=environment | pause_at(tmp_path / pattern, count),
                start_new_session=True,
                stdout=log,
                stderr=log,
            )
        wait_for(
            lambda process=process, pattern=pattern, count=count: (
                len(list(tmp_path.glob(pattern))) >= count or process.poll() is not None
            )
        )
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        wait_for(lambda process=process: not processes_of_session(process.pid))
        assert all(
            shard.read_bytes() == (reference_corpus / shard.name).read_bytes() for shard in tmp_path.glob("*.arrow")
        )
        for report in [*partial.glob("scan/*.json"), *partial.glob("shards/*.json")]:
            shards = itertools.chain.from_iterable(json.loads(report.read_text()).get("shards", {}).values())
            for file in [report, *(tmp_path / shard["file"] for shard in shards)]:
                assert written_at.setdefault(file, file.stat().st_mtime_ns) == file.stat().st_mtime_ns, "written again"
    assert killed == len(pause_points)
    (tmp_path / ".log").unlink()
    (tmp_path / ".train-00000.arrow.1.tmp").write_bytes(b"left by a killed worker")
    done = run(corpus, f"data.path={tmp_path}", "data.workers=2")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(reference_corpus)
    shards = {file: mtime for file, mtime in written_at.items() if file.suffix == ".arrow"}
    assert len(shards) >= units and all(file.stat().st_mtime_ns == mtime for file, mtime in shards.items())


@pytest.fixture
def running_preparation(corpus, reference_corpus, command, tmp_path):
    """A running preparation with two workers that has finished the first of many units."""
    large = tmp_path.parent / f"{tmp_path.name}.jsonl"
    large.write_text((corpus.parent / "0.jsonl").read_text() * 20)
    sources = [json_source(large)] * 40
    tokenizer = reference_corpus / "tokenizer"
    arguments, environment = command(
        corpus,
        f"data.path={tmp_path}",
        "data.workers=2",
        f"data.sources={json.dumps(sources)}",
        f"data.tokenizer={{path: {tokenizer}}}",
        "data.deduplicate=none",
    )
    process = subprocess.Popen(
        arguments,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # If a shell started the tests in the background, SIGINT is ignored, and child processes inherit this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: any(tmp_path.glob(".partial/shards/*.json")) or process.poll() is not None)
    yield process
    for pid in processes_of_session(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def workers_of(process: subprocess.Popen) -> list[int]:
    parents = processes_of_session(process.pid)
    # Workers are children of the fork server, which is a child of the main process.
    return [pid for pid, parent in parents.items() if parents.get(parent) == process.pid]


def test_workers_end_with_the_main_process(running_preparation):
    assert workers_of(running_preparation)
    running_preparation.kill()
    running_preparation.wait()
    wait_for(lambda: not processes_of_session(running_preparation.pid))


def test_a_killed_worker_is_reported_in_one_line(running_preparation):
    os.kill(workers_of(running_preparation)[0], signal.SIGKILL)
    _, output = running_preparation.communicate(timeout=TIMEOUT)
    assert running_preparation.returncode == 2
    assert output.startswith("error: a worker process of the preparation was killed") and output.count("\n") == 1, (
        output
    )


@pytest.mark.parametrize("to_group", [True, False], ids=["to the process group", "to the main process only"])
def test_ctrl_c_ends_the_preparation_immediately(running_preparation, to_group):
    (os.killpg if to_group else os.kill)(running_preparation.pid, signal.SIGINT)
    _, output = running_preparation.communicate(timeout=TIMEOUT)
    assert (running_preparation.returncode, output) == (130, "interrupted\n")
    wait_for(lambda: not processes_of_session(running_preparation.pid))


def test_changed_settings_restart_an_interrupted_preparation(write_jsonl, pairs, tmp_path, messages):
    good = json_source(write_jsonl(tmp_path / "good.jsonl", pairs(300)))
    bad = json_source(write_jsonl(tmp_path / "bad.jsonl", [*pairs(5, seed=1), {"text": [3]}]))
    tokenizer = data_config(tmp_path / "first", good).tokenizer
    prepare(data_config(tmp_path / "first", good))
    imported = {"path": str(tmp_path / "first" / "tokenizer")}
    with pytest.raises(
        UserError,
        match=r"bad\.jsonl:6: 'text' holds a value of type list, not text; fix the line, or .*on_malformed=drop",
    ):
        prepare(data_config(tmp_path / "out", good, good, bad, tokenizer=imported))
    assert any((tmp_path / "out").glob(".partial/scan/*.json")) and not (tmp_path / "out" / "manifest.json").exists()
    settings = {
        "tokenizer": tokenizer.model_dump(exclude_none=True) | {"vocab_size": VOCAB_SIZE - 10},
        "sequence_length": 64,
    }
    prepare(data_config(tmp_path / "out", good, **settings))
    assert "the interrupted preparation had different settings: starting from scratch" in messages
    prepare(data_config(tmp_path / "fresh", good, **settings))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_shards_without_a_manifest_are_neither_used_nor_removed(write_jsonl, pairs, tmp_path):
    source = json_source(write_jsonl(tmp_path / "a.jsonl", pairs(300)))
    prepare(data_config(tmp_path / "out", source))
    (tmp_path / "out" / "manifest.json").unlink()
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"no manifest\.json that describes them; remove that folder"):
        prepare(data_config(tmp_path / "out", source, tokenizer={"vocab_size": VOCAB_SIZE - 10}))
    assert contents(tmp_path / "out") == before


def test_a_folder_that_is_being_prepared_is_refused(corpus, run_expecting_user_error, tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_expecting_user_error(corpus, f"data.path={tmp_path}").startswith(
            f"another process is preparing {tmp_path}; wait for it"
        )
