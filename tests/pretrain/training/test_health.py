"""What ends a run and what does not: spikes, a rank that hangs, a full disk, signals while there is no step."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.evaluation.results import append_result, read_results
from pretrain.run_folder import list_steps, read_status, step_name
from pretrain.training.checkpoint import check
from pretrain.training.spikes import ENOUGH, WINDOW, SpikeRule, rewind
from tests.launching import ROOT, Running, call, environment, prepare_corpus, ranks_command, tiny_config, write_config
from tests.pretrain.training.holding import released
from tests.pretrain.training.same_state import assert_same_checkpoints
from tests.processes import wait_for

SPOILED = ROOT / "tests" / "pretrain" / "training" / "spoiled_run.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a prepared corpus."""
    folder = tmp_path_factory.mktemp("health")
    prepare_corpus(write_config(folder, tiny_config(folder)))
    return folder


def config(folder: Path, name: str, **changes) -> Path:
    return write_config(folder, tiny_config(folder, name=name, **changes))


def metrics(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_score_is_robust():
    rule = SpikeRule()
    for number in range(ENOUGH):
        assert rule.score(1e9) == 0
        rule.add(2.0 + 0.01 * (number % 5))
    quiet = rule.score(2.05)
    assert quiet < 3 and rule.score(2.5) > 10 and rule.score(1.0) < 0
    for _ in range(5):
        rule.add(100.0)  # outliers hardly move it
    assert rule.score(2.5) > 10
    for _ in range(2 * WINDOW):
        rule.add(5.0)
    assert len(rule.losses) == WINDOW and rule.score(5.0) == 0 and rule.score(5.2) == pytest.approx(0.2 / 0.025)


@pytest.fixture(scope="module")
def spiked(folder) -> dict[str, Path]:
    """Runs on one rank whose step 30 has a spike, by what they are told to do, and one without."""
    runs = {}
    answers = (("calm", "rewind", "none"), ("warned", "warn", "spike:30"), ("skipped", "skip", "spike:30"), ("rewound", "rewind", "spike:30"))
    for name, answer, spoil in answers:
        path = config(folder, name, train__steps=36, train__on_spike=answer, checkpoint={"every": 10, "keep": 9}, monitor__validate_every=100)
        runs[name] = folder / "runs" / name
        done = call(["python", str(SPOILED), spoil, str(path)], check=False)
        (folder / f"{name}.log").write_text(done.stdout + done.stderr)
        assert done.returncode == (75 if name == "rewound" else 0), done.stdout + done.stderr
    return runs


def skipped_of(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["optimizer/skipped_steps"] for line in metrics(run_dir)}


def test_a_spike_is_warned_of_and_skipped_if_that_is_asked_for(spiked, folder):
    for name in ("warned", "skipped"):
        log = (folder / f"{name}.log").read_text()
        assert log.count("WARNING: the loss of step 30 is a spike") == 1
        assert ("step 30 made no update: its loss is a spike (1 such steps so far)" in log) == (name == "skipped")
        lines = {line["step"]: line for line in metrics(spiked[name])}
        assert lines[30]["loss/spike_score"] > 10 and skipped_of(spiked[name])[36] == (name == "skipped")
    assert "spike" not in (folder / "calm.log").read_text() and skipped_of(spiked["calm"])[36] == 0
    calm, warned, skipped = ({line["step"]: line for line in metrics(spiked[name])} for name in ("calm", "warned", "skipped"))
    assert calm[31]["loss/lm"] == warned[31]["loss/lm"], "only what was shown of the loss was spoilt"
    assert calm[31]["loss/lm"] != skipped[31]["loss/lm"] and calm[30]["records"] == skipped[30]["records"]


def test_a_rewind_goes_back_and_leaves_the_records_out(spiked, folder):
    run_dir = spiked["rewound"]
    status = read_status(run_dir)
    assert status["status"] == "resumable" and "goes on from step 20 and leaves out steps 29 and 30" in status["reason"]
    again = call(["python", str(SPOILED), "spike:30", str(folder / "rewound.yaml")])
    assert "going on from step 20" in again.stdout and "finished at step 36" in again.stdout
    lines = {line["step"]: line for line in metrics(run_dir)}
    calm = {line["step"]: line for line in metrics(spiked["calm"])}
    assert sorted(lines) == sorted(calm) and [lines[step]["records"] for step in lines] == [calm[step]["records"] for step in calm]
    assert lines[28]["loss/lm"] == calm[28]["loss/lm"] and lines[36]["loss/lm"] != calm[36]["loss/lm"]
    assert (skipped_of(run_dir)[28], skipped_of(run_dir)[29], skipped_of(run_dir)[36]) == (0, 1, 2)
    events = EventAccumulator(str(run_dir / "tensorboard" / "train")).Reload()
    assert {event.step: event.value for event in events.Scalars("optimizer/skipped_steps")}[36] == 2


def test_what_a_rewind_goes_back_behind_is_evaluated_again(tmp_path):
    for folder, step in (("checkpoints", 20), ("checkpoints", 30), ("export", 20), ("export", 30)):
        (tmp_path / folder / step_name(step)).mkdir(parents=True)
    (tmp_path / "evaluation").mkdir()
    before = [{"step": step, "task": "a", "metrics": {"exact": 0.5}, "rewinds": 0} for step in (20, 30)]
    for result in before:
        append_result(tmp_path, result)
    assert rewind(tmp_path, 31, 12.0) == 20
    assert list_steps(tmp_path / "checkpoints") == list_steps(tmp_path / "export") == [20] and read_results(tmp_path) == before[:1]
    append_result(tmp_path, again := before[1] | {"rewinds": 1})
    assert read_results(tmp_path) == [before[0], again]


def test_a_rank_that_stands_still_is_named_and_the_run_ends(folder):
    path = config(folder, "hung", train__steps=5000, monitor__hang_seconds=10, checkpoint={"every": 1000})
    running = Running(ranks_command(2, "launcher/run.py", path), folder / "hung.log")
    running.wait_until(lambda: len(metrics(folder / "runs" / "hung")) >= 3, "three steps")
    stopped = running.ranks()[1]
    stopped.send_signal(signal.SIGSTOP)
    assert running.end() != 0
    wait_for(lambda: not stopped.is_running())
    log = running.log.read_text()
    hung = int(re.search(r"error: the run hangs since (\d+) s", log)[1])
    assert 10 <= hung < 5 * 10, "it waits for hang_seconds, not for a multiple"
    assert f"rank 1 on {os.uname().nodename} at step" in log and "without a sign of life" in log
    status = read_status(folder / "runs" / "hung")
    assert status["status"] == "resumable" and "rank 1" in status["reason"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_ends_the_save_and_not_the_run(folder, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        path = config(folder, "full", output_dir=str(small), train__steps=40, checkpoint={"every": 5, "keep": 2})
        run_dir, filler = small / "full", small / "filler"
        running = Running(ranks_command(2, SPOILED, "hold:11,17", path), folder / "full.log")
        running.wait_until(lambda: list_steps(run_dir / "checkpoints"), "a checkpoint")
        with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))
        released(path, 11).touch()
        running.wait_until(lambda: "was not written" in running.log.read_text(), "a save that fails")
        kept = list_steps(run_dir / "checkpoints")
        assert kept and all(check(run_dir / "checkpoints" / step_name(step)) is None for step in kept)
        filler.unlink()
        released(path, 17).touch()
        assert running.end() == 0, running.log.read_text()[-3000:]
        log = running.log.read_text()
        assert "the run goes on" in log and "Traceback" not in log and list_steps(run_dir / "checkpoints")[-1] == 40
        assert [line["step"] for line in metrics(run_dir)] == list(range(1, 41))
        assert metrics(run_dir)[-1]["checkpoint/failed"] >= 1
        events = EventAccumulator(str(run_dir / "tensorboard" / "train")).Reload()
        assert [event.step for event in events.Scalars("loss/lm")] == list(range(1, 41))
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_signal_during_validation_or_start_leaves_the_run_resumable_and_nothing_is_lost(folder):
    settings = {"train__steps": 8, "monitor__validate_every": 4, "checkpoint": {"every": 8}, "train__micro_batch_rows": 2}
    straight = config(folder, "straight", **settings)
    call(ranks_command(2, SPOILED, "none", straight))
    path = config(folder, "cut", **settings)
    running = Running(ranks_command(2, SPOILED, "validation:4", path), folder / "cut.log")
    running.wait_until(lambda: "waiting in the validation of step 4" in running.log.read_text(), "a validation")
    running.ranks()[1].send_signal(signal.SIGUSR1)
    running.end()
    run_dir = folder / "runs" / "cut"
    assert read_status(run_dir)["status"] == "resumable" and list_steps(run_dir / "checkpoints") == [4]
    running = Running(ranks_command(2, SPOILED, "hold:0", path), folder / "cut2.log")
    running.wait_until(lambda: "waiting before the start" in running.log.read_text(), "the start")
    running.ranks()[0].send_signal(signal.SIGTERM)
    released(path, 0).touch()
    running.end()
    assert read_status(run_dir)["status"] == "resumable" and list_steps(run_dir / "checkpoints") == [4], running.log.read_text()
    running = Running(ranks_command(2, SPOILED, "hold:6", path), folder / "killed.log")
    running.wait_until(lambda: any(line["step"] == 5 for line in metrics(run_dir)), "the step behind the validation that was made up")
    running.kill()  # so that it is made up once more
    running = Running(ranks_command(2, SPOILED, "validation:8", path), folder / "cut3.log")
    running.wait_until(lambda: "waiting in the validation of step 8" in running.log.read_text(), "the last step, which is validated too")
    running.ranks()[1].send_signal(signal.SIGTERM)
    running.end()
    assert read_status(run_dir)["status"] == "resumable" and list_steps(run_dir / "checkpoints")[-1] == 8, running.log.read_text()
    assert "finished at step 8" in call(ranks_command(2, SPOILED, "none", path)).stdout
    assert_same_checkpoints(*(folder / "runs" / name / "checkpoints" / step_name(8) for name in ("straight", "cut")))
    tables = [[{tag: value for tag, value in line.items() if not tag.startswith(("seconds", "throughput"))}
               for line in metrics(folder / "runs" / name)] for name in ("straight", "cut")]
    assert tables[0] == tables[1] and all("validation/loss/lm" in tables[1][step - 1] for step in (4, 8))


def test_checkpoints_are_kept_for_good_and_written_on_the_training_thread_if_asked(folder):
    path = config(folder, "kept", train__steps=12, checkpoint={"every": 2, "keep": 1, "keep_every": 4, "background": False})
    call(["python", "launcher/run.py", str(path)])
    folder = folder / "runs" / "kept" / "checkpoints"
    assert list_steps(folder) == [4, 8, 12] and all(check(folder / step_name(step)) is None for step in (4, 8, 12))


def test_a_damaged_pointer_is_told_and_mended(folder):
    path = config(folder, "pointer", train__steps=4, checkpoint={"every": 2})
    call(["python", "launcher/run.py", str(path)])
    checkpoints = folder / "runs" / "pointer" / "checkpoints"
    shutil.rmtree(checkpoints / step_name(4))
    (folder / "runs" / "pointer" / "status.json").unlink()
    for content in ("", "step-00000077\n", None):
        (checkpoints / "latest").unlink(missing_ok=True)
        if content is not None:
            (checkpoints / "latest").write_text(content)
        done = call(["python", "launcher/run.py", str(path)], **environment())
        assert "going on from step 2" in done.stdout and ("latest named" in done.stdout or "latest was empty or missing" in done.stdout)
        assert (checkpoints / "latest").read_text() == step_name(4) + "\n"
        shutil.rmtree(checkpoints / step_name(4))
        (folder / "runs" / "pointer" / "status.json").unlink()
