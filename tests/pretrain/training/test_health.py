"""Health of a run: spikes, hanging ranks, a full disk, and signals outside a step."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.evaluation.results import append_result, read_results
from pretrain.run_folder import list_steps, read_metrics, read_rewinds, read_status, step_name
from pretrain.training.checkpoint import check
from pretrain.training.hooks import StepReport
from pretrain.training.loggers import metrics_file, tensorboard
from pretrain.training.spikes import (
    MAX_REWINDS,
    MAX_REWINDS_PER_CHECKPOINT,
    MIN_HISTORY,
    WINDOW,
    CannotRewind,
    SpikeRule,
    rewind,
)
from pretrain.training.watchdog import EXIT_CODE_HUNG
from tests.commands import (
    ROOT,
    BackgroundCommand,
    environment,
    prepare_corpus,
    ranks_command,
    read_complete_lines,
    run_command,
    tiny_config,
    write_config,
)
from tests.pretrain.training.checkpoint_equality import assert_same_checkpoints
from tests.pretrain.training.pause_points import release_file
from tests.processes import wait_for
from tests.ranks import free_port

WAITING = str(ROOT / "tests" / "pretrain" / "training" / "waiting_ranks.py")
FAULTY_RUN = ROOT / "tests" / "pretrain" / "training" / "faulty_run.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prepare a corpus and return its folder."""
    folder = tmp_path_factory.mktemp("health")
    prepare_corpus(write_config(folder, tiny_config(folder)))
    return folder


def config(folder: Path, name: str, **changes) -> Path:
    return write_config(folder, tiny_config(folder, name=name, **changes))


def metrics(run_dir: Path) -> list[dict]:
    return read_complete_lines(run_dir / "metrics.jsonl")


def test_the_spike_score_is_robust_to_outliers():
    rule = SpikeRule()
    for number in range(MIN_HISTORY):
        assert rule.score("lm", 1e9, 100) == 0
        rule.add("lm", 2.0 + 0.01 * (number % 5), 100)
    usual = rule.score("lm", 2.05, 100)
    assert usual < 3 and rule.score("lm", 2.5, 100) > 10 and rule.score("lm", 1.0, 100) < 0
    for _ in range(5):
        rule.add("lm", 100.0, 100)  # outliers hardly change the score
    assert rule.score("lm", 2.5, 100) > 10
    for _ in range(2 * WINDOW):
        rule.add("lm", 5.0, 100)
    assert len(rule.losses["lm"]) == WINDOW and rule.score("lm", 5.0, 100) == 0
    assert rule.score("lm", 5.2, 100) == pytest.approx(0.2 / 0.025)


def test_a_loss_is_compared_with_losses_of_the_same_term_and_of_similar_counts():
    rule = SpikeRule()
    for _ in range(MIN_HISTORY):
        rule.add("lm", 2.0, 100)
        rule.add("jepa", 0.5, 100)
    assert rule.score("jepa", 2.0, 100) > 10 and rule.score("lm", 2.0, 100) == 0
    for count in (200, 50):
        assert rule.score("jepa", 2.0, count) > 10
    # a contrastive loss over more pairs is larger, and a mean over few pairs varies more
    for count in (201, 49):
        assert rule.score("jepa", 2.0, count) == 0
    restored = SpikeRule()
    restored.load(json.loads(json.dumps(rule.losses)))
    assert restored.losses == rule.losses
    restored.load([2.5] * MIN_HISTORY)  # the format of earlier versions, which saved total losses
    assert restored.score("lm", 1e9, 100) == 0


def test_a_term_with_weight_zero_is_recorded_but_never_a_spike():
    rule = SpikeRule()
    weights, counts = {"lm": 1.0, "jepa": 0.0}, {"lm": 100, "jepa": 100}
    for _ in range(MIN_HISTORY):
        assert rule.judge({"lm": 2.0, "jepa": 0.5}, counts, weights) == (0.0, "lm")
    score, term = rule.judge({"lm": 2.0, "jepa": 50.0}, counts, weights)
    assert (score, term) == (0.0, "lm") and len(rule.losses["jepa"]) == MIN_HISTORY + 1
    # a scheduled weight starts to grow
    score, term = rule.judge({"jepa": 50.0}, counts, weights | {"jepa": 0.1})
    assert score > 10 and term == "jepa"
    assert rule.judge({}, counts, weights) == (0.0, "")


def test_steps_without_pairs_have_no_jepa_loss_and_steps_with_few_pairs_are_not_spikes(folder):
    (folder / "documents.jsonl").write_text(
        json.dumps({"code": ".*dog.*"}) + "\n" + json.dumps({"code": ".*cat.*"}) + "\n"
    )
    sources = [
        {"type": "nlrx", "records": 600},
        {"type": "json", "path": str(folder / "documents.jsonl"), "split": "validation"},
    ]
    data = {"data__path": str(folder / "few"), "data__sources": sources, "data__missing_views": "keep"}
    dropout = {"objective__dropout": 0.97, "objective__distance": "cosine", "objective__weight": 20.0}
    path = config(folder, "few-pairs", train__steps=60, train__on_spike="skip", monitor__loggers=[], **data, **dropout)
    prepare_corpus(path)
    done = run_command(["python", "launcher/run.py", str(path)])
    lines = metrics(folder / "runs" / "few-pairs")
    with_pairs = [line for line in lines if "loss/jepa" in line]
    assert MIN_HISTORY < len(with_pairs) < len(lines) == 60
    for line in lines:
        assert (
            line["loss/total"] == pytest.approx(line["loss/lm"] + 20 * line.get("loss/jepa", 0))
            and line.get("loss/jepa") != 0
        )
    printed = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert ["jepa" in line for line in printed] == ["loss/jepa" in line for line in lines]
    assert lines[-1]["optimizer/skipped_steps"] == 0 and "spike" not in done.stdout
    assert "validation/loss/lm" in lines[-1] and "validation/loss/jepa" not in lines[-1], (
        "the test needs a validation split without pairs"
    )
    assert "validation at step 60: lm " in done.stdout


@pytest.fixture(scope="module")
def spiked(folder) -> dict[str, Path]:
    """Train a run without a spike and runs with a spike in step 30, one per setting of train.on_spike.

    All runs have one rank. Return their folders by name.
    """
    runs = {}
    cases = (
        ("calm", "rewind", "none"),
        ("warned", "warn", "spike:30"),
        ("skipped", "skip", "spike:30"),
        ("rewound", "rewind", "spike:30"),
    )
    for name, on_spike, fault in cases:
        path = config(
            folder,
            name,
            train__steps=36,
            train__on_spike=on_spike,
            checkpoint={"every": 10, "keep": 9},
            monitor__validate_every=100,
        )
        runs[name] = folder / "runs" / name
        done = run_command(["python", str(FAULTY_RUN), fault, str(path)], check=False)
        (folder / f"{name}.log").write_text(done.stdout + done.stderr)
        assert done.returncode == (75 if name == "rewound" else 0), done.stdout + done.stderr
    return runs


def skipped_of(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["optimizer/skipped_steps"] for line in metrics(run_dir)}


def test_a_spike_is_reported_and_skipped_only_if_configured(spiked, folder):
    for name in ("warned", "skipped"):
        log = (folder / f"{name}.log").read_text()
        assert log.count("WARNING: the loss of step 30 is a spike") == 1
        assert ("step 30 was skipped: its loss is a spike (1 skipped steps so far)" in log) == (name == "skipped")
        lines = {line["step"]: line for line in metrics(spiked[name])}
        assert lines[30]["loss/spike_score"] > 10 and skipped_of(spiked[name])[36] == (name == "skipped")
    assert "spike" not in (folder / "calm.log").read_text() and skipped_of(spiked["calm"])[36] == 0
    calm, warned, skipped = (
        {line["step"]: line for line in metrics(spiked[name])} for name in ("calm", "warned", "skipped")
    )
    assert calm[31]["loss/lm"] == warned[31]["loss/lm"], "the fault changes only the reported loss"
    assert calm[31]["loss/lm"] != skipped[31]["loss/lm"] and calm[30]["records"] == skipped[30]["records"]


def test_a_rewind_goes_back_and_skips_the_records_of_the_spike(spiked, folder):
    run_dir = spiked["rewound"]
    status = read_status(run_dir)
    assert status["status"] == "resumable" and "resumes from step 20 and skips steps 29 and 30" in status["reason"]
    resumed = run_command(["python", str(FAULTY_RUN), "spike:30", str(folder / "rewound.yaml")])
    assert "resuming from step 20" in resumed.stdout and "finished at step 36" in resumed.stdout
    lines = {line["step"]: line for line in metrics(run_dir)}
    calm = {line["step"]: line for line in metrics(spiked["calm"])}
    assert sorted(lines) == sorted(calm) and [lines[step]["records"] for step in lines] == [
        calm[step]["records"] for step in calm
    ]
    assert lines[28]["loss/lm"] == calm[28]["loss/lm"] and lines[36]["loss/lm"] != calm[36]["loss/lm"]
    assert (skipped_of(run_dir)[28], skipped_of(run_dir)[29], skipped_of(run_dir)[36]) == (0, 1, 2)
    events = EventAccumulator(str(run_dir / "tensorboard" / "train")).Reload()
    assert {event.step: event.value for event in events.Scalars("optimizer/skipped_steps")}[36] == 2


def test_steps_after_the_target_of_a_rewind_are_evaluated_again(tmp_path):
    for folder, step in (("checkpoints", 20), ("checkpoints", 30), ("export", 20), ("export", 30)):
        (tmp_path / folder / step_name(step)).mkdir(parents=True)
    (tmp_path / "evaluation").mkdir()
    before = [{"step": step, "task": "a", "metrics": {"exact": 0.5}, "rewinds": 0} for step in (20, 30)]
    for result in before:
        append_result(tmp_path, result)
    assert rewind(tmp_path, 31, 12.0) == 20
    assert (
        list_steps(tmp_path / "checkpoints") == list_steps(tmp_path / "export") == [20]
        and read_results(tmp_path) == before[:1]
    )
    append_result(tmp_path, new_result := before[1] | {"rewinds": 1})
    assert read_results(tmp_path) == [before[0], new_result]


def test_rewinds_are_limited_per_checkpoint_and_in_total(tmp_path):
    for step in range(0, 10 * MAX_REWINDS, 10):
        (tmp_path / "checkpoints" / step_name(step)).mkdir(parents=True)
    with pytest.raises(CannotRewind, match="no checkpoint is older"):
        rewind(tmp_path, 1, 12.0)
    for _ in range(MAX_REWINDS_PER_CHECKPOINT):
        assert rewind(tmp_path, 10 * MAX_REWINDS, 12.0) == 10 * (MAX_REWINDS - 1)
    with pytest.raises(CannotRewind, match=f"has already gone back to step 190 {MAX_REWINDS_PER_CHECKPOINT} times"):
        rewind(tmp_path, 10 * MAX_REWINDS, 12.0)
    for back in range(MAX_REWINDS_PER_CHECKPOINT, MAX_REWINDS):
        assert rewind(tmp_path, 10 * (MAX_REWINDS - back) + 5, 12.0) == 10 * (MAX_REWINDS - back)
    (tmp_path / "checkpoints" / step_name(7)).mkdir()
    with pytest.raises(CannotRewind, match=f"has already gone back {MAX_REWINDS} times"):
        rewind(tmp_path, 9, 12.0)
    assert len(read_rewinds(tmp_path)) == MAX_REWINDS


def test_a_rewind_that_cannot_be_written_skips_the_step_on_all_ranks(folder):
    path = config(
        folder,
        "unwritten",
        train__steps=32,
        train__on_spike="rewind",
        checkpoint={"every": 10},
        monitor__validate_every=100,
    )
    running = BackgroundCommand(ranks_command(2, FAULTY_RUN, "spike:30+hold:30", path), folder / "unwritten.log")
    run_dir = folder / "runs" / "unwritten"
    running.wait_until(lambda: [line for line in metrics(run_dir) if line["step"] == 29], "step 29")
    (run_dir / "rewinds.json").mkdir()  # a folder with this name prevents writing the file
    release_file(path, 30).touch()
    assert running.end() == 0, running.log.read_text()
    log = running.log.read_text()
    assert (
        log.count("WARNING: cannot rewind before the spike of step 30") == 1
        and "finished at step 32" in log
        and "Traceback" not in log
    )
    assert skipped_of(run_dir)[32] == 1


def test_a_rewind_changes_nothing_if_a_checkpoint_cannot_be_set_aside(tmp_path):
    for step in (20, 30):
        (tmp_path / "checkpoints" / step_name(step)).mkdir(parents=True)
    (tmp_path / "checkpoints" / f".{step_name(30)}.tmp").write_text("a folder cannot take the place of this file")
    with pytest.raises(CannotRewind, match="cannot write to"):
        rewind(tmp_path, 31, 12.0)
    assert read_rewinds(tmp_path) == [] and list_steps(tmp_path / "checkpoints") == [20, 30]


def fake_run(run_dir: Path, step: int) -> Any:
    """Return what loggers read of a run that resumes after a step."""
    return SimpleNamespace(
        config=SimpleNamespace(run_dir=run_dir, monitor=SimpleNamespace(layers_every=0)),
        progress=SimpleNamespace(step=step),
        last_logged_step=step,
        objective=SimpleNamespace(units={"lm": None}),
    )


def test_damaged_lines_of_metrics_are_reported_on_reading_and_on_resuming(tmp_path, messages):
    lines = [json.dumps({"step": step, "loss/lm": 1.0}) for step in range(1, 8)]
    damaged = [*lines[:2], "\0" * 20, *lines[2:4], '"a text"', '{"step": null}', *lines[4:]]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(damaged).encode() + b"\n\xff\xfe\n" + b'{"step": 8, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 8))
    metrics_file.Logger().start(fake_run(tmp_path, 6))
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 7))
    assert messages == [
        f"WARNING: {tmp_path / 'metrics.jsonl'}: 4 corrupt lines are {treatment}, the first is line 3"
        for treatment in ("ignored", "removed")
    ]


def test_tensorboard_shows_the_new_steps_after_a_resume_even_if_the_clock_went_back(tmp_path):
    folder = tmp_path / "tensorboard" / "train"

    def train(start: int, stop: int, value: float) -> None:
        run, logger = fake_run(tmp_path, start), tensorboard.Logger()
        logger.start(run)
        for run.progress.step in range(start + 1, stop + 1):
            logger.after_step(run, StepReport({"loss/lm": value}))
        logger.end(run, "finished")

    for start, value in ((0, 1.0), (5, 2.0), (8, 3.0)):
        for path in folder.glob("*"):  # date the files of earlier starts an hour ahead
            created, rest = path.name.removeprefix("events.out.tfevents.").split(".", 1)
            path.rename(folder / f"events.out.tfevents.{int(created) + 3600:010d}.{rest}")
        train(start, 10, value)
    shown = [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars("loss/lm")]
    assert shown == [(step, 1.0 if step <= 5 else 2.0 if step <= 8 else 3.0) for step in range(1, 11)]


def test_a_rank_that_hangs_is_named_and_the_run_ends(folder):
    path = config(folder, "hung", train__steps=5000, monitor__hang_seconds=40, checkpoint={"every": 1000})
    running = BackgroundCommand(ranks_command(2, "launcher/run.py", path), folder / "hung.log")
    running.wait_until(lambda: len(metrics(folder / "runs" / "hung")) >= 3, "three steps")
    stopped = running.ranks()[1]
    stopped.send_signal(signal.SIGSTOP)
    assert running.end() != 0
    wait_for(lambda: not stopped.is_running())
    log = running.log.read_text()
    assert re.search(rf"error: rank 1 on {os.uname().nodename} at step \d+ has sent no heartbeat for \d+ s", log)
    own_log = (folder / "runs" / "hung" / "logs" / "rank-00001.log").read_text()
    assert "has sent no heartbeat for 25 s" in own_log, (
        "the heartbeat killer should end the rank soon after its peers, before hang_seconds are over"
    )
    status = read_status(folder / "runs" / "hung")
    assert status["status"] == "resumable" and "rank 1" in status["reason"]


def test_a_dead_rank_is_noticed_without_a_failing_collective(folder):
    """Detect the dead rank only by its heartbeats, because under NCCL no collective fails when a rank dies.

    A rank that has finished, or that pauses for a while, does not count as dead.
    """

    def start_ranks(case: str) -> list[BackgroundCommand]:
        variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = ["python", WAITING, case]
        return [
            BackgroundCommand(command, folder / f"{case}-{rank}.log", RANK=str(rank), LOCAL_RANK=str(rank), **variables)
            for rank in range(2)
        ]

    killed, ended, paused = (start_ranks(case) for case in ("killed", "ended", "paused"))
    assert [running.end() for running in (*ended, *paused)] == [0, 0, 0, 0]
    assert [running.end() for running in killed] == [EXIT_CODE_HUNG, -signal.SIGKILL]
    assert re.search(
        rf"rank 0: rank 1 on {os.uname().nodename} at step \d+ has sent no heartbeat for \d+ s",
        killed[0].log.read_text(),
    )


def test_a_single_rank_that_hangs_is_ended(folder):
    path = config(folder, "alone", train__steps=50, monitor__hang_seconds=10)
    done = run_command(["python", str(FAULTY_RUN), "hang:3", str(path)], check=False)
    assert done.returncode == EXIT_CODE_HUNG
    assert re.search(
        rf"error: the run has been hanging for \d+ s: the process on {os.uname().nodename} is not getting past step 3",
        done.stderr,
    )
    status = read_status(folder / "runs" / "alone")
    assert status["status"] == "resumable" and "is not getting past step 3" in status["reason"]


def test_a_full_disk_that_ends_a_single_rank_leaves_it_to_be_restarted(folder):
    path = config(folder, "alone_full", train__steps=50)
    done = run_command(["python", str(FAULTY_RUN), "full:3", str(path)], check=False)
    # supervise starts the run again after exit code 1, and not after 2
    assert done.returncode == 1 and "error: somewhere: No space left on device; " in done.stderr
    assert "Traceback" not in done.stderr
    assert "No space left" in read_status(folder / "runs" / "alone_full")["reason"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_fails_the_save_but_not_the_run(folder, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        path = config(folder, "full", output_dir=str(small), train__steps=40, checkpoint={"every": 5, "keep": 2})
        run_dir, filler = small / "full", small / "filler"
        running = BackgroundCommand(ranks_command(2, FAULTY_RUN, "hold:11,17", path), folder / "full.log")
        running.wait_until(lambda: list_steps(run_dir / "checkpoints"), "a checkpoint")
        with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))
        release_file(path, 11).touch()
        running.wait_until(lambda: "was not written" in running.log.read_text(), "a save that fails")
        kept = list_steps(run_dir / "checkpoints")
        assert kept and all(check(run_dir / "checkpoints" / step_name(step)) is None for step in kept)
        filler.unlink()
        release_file(path, 17).touch()
        assert running.end() == 0, running.log.read_text()[-3000:]
        log = running.log.read_text()
        assert "the run continues" in log and "Traceback" not in log and list_steps(run_dir / "checkpoints")[-1] == 40
        assert [line["step"] for line in metrics(run_dir)] == list(range(1, 41))
        assert metrics(run_dir)[-1]["checkpoint/failed"] >= 1
        events = EventAccumulator(str(run_dir / "tensorboard" / "train")).Reload()
        assert [event.step for event in events.Scalars("loss/lm")] == list(range(1, 41))
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_signal_during_validation_or_start_leaves_the_run_resumable_without_loss(folder):
    settings = {
        "train__steps": 8,
        "monitor__validate_every": 4,
        "checkpoint": {"every": 8},
        "train__micro_batch_rows": 2,
    }
    uninterrupted = config(folder, "uninterrupted", **settings)
    run_command(ranks_command(2, FAULTY_RUN, "none", uninterrupted))
    path = config(folder, "cut", **settings)
    running = BackgroundCommand(ranks_command(2, FAULTY_RUN, "validation:4", path), folder / "cut.log")
    running.wait_until(lambda: "waiting in the validation of step 4" in running.log.read_text(), "a validation")
    running.ranks()[1].send_signal(signal.SIGUSR1)
    running.end()
    run_dir = folder / "runs" / "cut"
    assert read_status(run_dir)["status"] == "resumable" and list_steps(run_dir / "checkpoints") == [4]
    running = BackgroundCommand(ranks_command(2, FAULTY_RUN, "hold:0", path), folder / "cut2.log")
    running.wait_until(lambda: "waiting before the start" in running.log.read_text(), "the start")
    running.ranks()[0].send_signal(signal.SIGTERM)
    release_file(path, 0).touch()
    running.end()
    assert read_status(run_dir)["status"] == "resumable" and list_steps(run_dir / "checkpoints") == [4], (
        running.log.read_text()
    )
    running = BackgroundCommand(ranks_command(2, FAULTY_RUN, "hold:6", path), folder / "killed.log")
    running.wait_until(
        lambda: any(line["step"] == 5 for line in metrics(run_dir)), "the step after the pending validation"
    )
    running.kill()  # the next start has to do the validation again
    running = BackgroundCommand(ranks_command(2, FAULTY_RUN, "validation:8", path), folder / "cut3.log")
    running.wait_until(
        lambda: "waiting in the validation of step 8" in running.log.read_text(),
        "the validation of the last step",
    )
    running.ranks()[1].send_signal(signal.SIGTERM)
    running.end()
    assert read_status(run_dir)["status"] == "resumable" and list_steps(run_dir / "checkpoints")[-1] == 8, (
        running.log.read_text()
    )
    assert "finished at step 8" in run_command(ranks_command(2, FAULTY_RUN, "none", path)).stdout
    assert_same_checkpoints(
        *(folder / "runs" / name / "checkpoints" / step_name(8) for name in ("uninterrupted", "cut"))
    )

    def comparable(line: dict) -> dict:
        return {
            tag: value
            for tag, value in line.items()
            if not tag.startswith(("seconds", "processor_seconds", "throughput"))
        }

    expected, found = (list(map(comparable, metrics(folder / "runs" / name))) for name in ("uninterrupted", "cut"))
    assert expected == found and all("validation/loss/lm" in found[step - 1] for step in (4, 8))


def test_checkpoints_are_kept_permanently_and_written_on_the_training_thread_if_configured(folder):
    path = config(
        folder, "kept", train__steps=12, checkpoint={"every": 2, "keep": 1, "keep_every": 4, "background": False}
    )
    run_command(["python", "launcher/run.py", str(path)])
    folder = folder / "runs" / "kept" / "checkpoints"
    assert list_steps(folder) == [4, 8, 12] and all(check(folder / step_name(step)) is None for step in (4, 8, 12))


def test_a_wrong_latest_file_is_reported_and_fixed(folder):
    path = config(folder, "pointer", train__steps=4, checkpoint={"every": 2})
    run_command(["python", "launcher/run.py", str(path)])
    checkpoints = folder / "runs" / "pointer" / "checkpoints"
    shutil.rmtree(checkpoints / step_name(4))
    (folder / "runs" / "pointer" / "status.json").unlink()
    for content in ("step-00000077\n", None):
        (checkpoints / "latest").unlink(missing_ok=True)
        if content is not None:
            (checkpoints / "latest").write_text(content)
        done = run_command(["python", "launcher/run.py", str(path)], **environment())
        assert "resuming from step 2" in done.stdout and (
            "latest named" in done.stdout or "latest was empty or missing" in done.stdout
        )
        assert (checkpoints / "latest").read_text() == step_name(4) + "\n"
        shutil.rmtree(checkpoints / step_name(4))
        (folder / "runs" / "pointer" / "status.json").unlink()


def test_a_conversion_that_is_interrupted_leaves_the_run_resumable_and_no_files(folder):
    path = config(folder, "converted", train__steps=4, checkpoint={"every": 2})
    run_command(ranks_command(2, FAULTY_RUN, "none", path))
    run_dir = folder / "runs" / "converted"
    checkpoints = run_dir / "checkpoints"
    (run_dir / "status.json").unlink()
    for ending in ("a signal", "a kill"):
        running = BackgroundCommand(
            ["python", str(FAULTY_RUN), "convert:0", str(path), "train.micro_batch_rows=8"], folder / "converted.log"
        )
        running.wait_until(lambda: list(checkpoints.glob(".step-*")), "a conversion")
        converter = next(
            child
            for child in psutil.Process(running.process.pid).children(recursive=True)
            if "makedirs" in " ".join(child.cmdline())
        )
        if ending == "a kill":
            running.kill()
        else:
            os.kill(running.process.pid, signal.SIGTERM)
            assert running.end() == 75, running.log.read_text()
            assert read_status(run_dir)["status"] == "resumable" and not list(checkpoints.glob(".step-*"))
            assert "Traceback" not in running.log.read_text()
        wait_for(lambda converter=converter: not converter.is_running())
    assert list(checkpoints.glob(".step-*"))
    # this start does not convert the checkpoint, and removes the files that are left over from the kill
    run_command(ranks_command(2, FAULTY_RUN, "none", path))
    assert not list(checkpoints.glob(".step-*")) and list_steps(checkpoints) == [2, 4]


def test_a_second_start_that_crashes_does_not_change_the_status_of_the_live_run(folder):
    path = config(folder, "alive", train__steps=4)
    running = BackgroundCommand(["python", str(FAULTY_RUN), "hold:2", str(path)], folder / "alive.log")
    running.wait_until(lambda: metrics(folder / "runs" / "alive"), "a step")
    for command in (["python", str(FAULTY_RUN), "crash:0", str(path)], ranks_command(2, FAULTY_RUN, "crash:0", path)):
        done = run_command(command, check=False)
        assert done.returncode == 1 and "RuntimeError: a bug" in done.stderr
        assert read_status(folder / "runs" / "alive")["status"] == "running"
    release_file(path, 2).touch()
    assert running.end() == 0 and read_status(folder / "runs" / "alive")["status"] == "finished"
    run_command(["python", str(FAULTY_RUN), "crash:0", str(path)], check=False)
    assert read_status(folder / "runs" / "alive")["status"] == "finished"


def test_a_run_warns_if_a_save_takes_longer_than_the_grace_period_of_launchers(folder):
    path = config(folder, "slow", train__steps=4, checkpoint={"every": 2})
    note = "launchers kill the ranks 0 s after Ctrl-C or SIGTERM"
    assert run_command(ranks_command(2, FAULTY_RUN, "grace:0", path)).stdout.count(note) == 1
