"""Traces of PyTorch's profiler."""

import gzip
import json
import signal

import pytest

from tests.commands import (
    BackgroundCommand,
    prepare_corpus,
    ranks_command,
    read_complete_lines,
    run_command,
    tiny_config,
    write_config,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    path = write_config(folder, tiny_config(folder, train__steps=4, monitor__profile={"steps": [2, 3]}))
    prepare_corpus(path)
    return path


def test_every_rank_writes_a_trace_and_the_slowest_operators_are_printed(path):
    done = run_command(ranks_command(2, "launcher/run.py", path))
    folder = path.parent / "runs" / "run" / "profile"
    assert sorted(file.name for file in folder.iterdir()) == [
        f"rank-0000{rank}.steps-2-3.pt.trace.json.gz" for rank in (0, 1)
    ]
    for file in folder.iterdir():
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        names = [event.get("name", "") for event in events]
        assert "aten::mm" in names and any("all_gather" in name or "allgather" in name for name in names)
        assert sum(name.startswith("Optimizer.step") for name in names) in (2, 4)  # one or two groups, two steps
    assert "profile of steps 2 to 3" in done.stdout and "aten::mm" in done.stdout and "Self CPU" in done.stdout


def test_a_stopped_run_profiles_the_remaining_steps(path, tmp_path):
    config = write_config(path.parent, tiny_config(path.parent, name="stopped", monitor__profile={"steps": [2, 3]}))
    held = BackgroundCommand(
        ["python", "tests/pretrain/training/faulty_run.py", "hold:2", str(config)], tmp_path / "log"
    )
    held.wait_until(lambda: read_complete_lines(path.parent / "runs" / "stopped" / "metrics.jsonl"), "the first step")
    held.process.send_signal(signal.SIGTERM)
    held.end()
    run_command(["python", "launcher/run.py", str(config)])
    files = (path.parent / "runs" / "stopped" / "profile").iterdir()
    assert sorted(file.name for file in files) == [
        f"rank-00000.steps-{step}-{step}.pt.trace.json.gz" for step in (2, 3)
    ]


def test_a_trace_that_cannot_be_written_does_not_end_the_run(path):
    config = write_config(path.parent, tiny_config(path.parent, name="blocked", monitor__profile={"steps": [2, 3]}))
    run_dir = path.parent / "runs" / "blocked"
    run_dir.mkdir(parents=True)
    (run_dir / "profile").write_text("a file where the folder should be")
    done = run_command(["python", "launcher/run.py", str(config)])
    assert "cannot write the profile" in done.stdout and "the run continues without it" in done.stdout
    assert json.loads((run_dir / "status.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [("[3, 2]", "must be the first and the last step"), ("[2, 5]", "ends at step 5, but train.steps is 4")],
)
def test_impossible_steps_are_refused(path, steps, expected):
    done = run_command(["python", "launcher/run.py", str(path), f"monitor.profile.steps={steps}"], check=False)
    assert done.returncode == 2 and expected in done.stderr
