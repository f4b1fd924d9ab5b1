"""`evaluate.py --watch` evaluates every checkpoint once, despite kills; several processes share the work."""

import itertools
import json
import os
import random
import shutil
import time

import pytest

from pretrain.config import load_config
from pretrain.evaluation.watch import CheckpointWatcher
from pretrain.run_folder import PINS, list_steps, step_name
from pretrain.training import checkpoint
from pretrain.training.checkpoint import prune
from pretrain.training.evaluation_requests import request_evaluation
from pretrain.training.spikes import rewind
from tests.commands import (
    BackgroundCommand,
    prepare_corpus,
    ranks_command,
    read_complete_lines,
    run_command,
    tiny_config,
    write_config,
)
from tests.pretrain.evaluation.test_job import read_lines, write_pairs
from tests.processes import TIMEOUT

STEPS, EVERY = 30, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepare a corpus and the configuration of a run that keeps its checkpoints, and return their folder."""
    folder = tmp_path_factory.mktemp("watch")
    pairs = write_pairs(folder / "pairs.jsonl", "test", 30)
    write_config(
        folder,
        tiny_config(
            folder,
            train__steps=STEPS,
            checkpoint={"every": EVERY, "keep": 9},
            evaluation={"tasks": [{"name": "loss", "test": str(pairs)}]},
        ),
    )
    prepare_corpus(folder / "run.yaml")
    return folder


def start_watch(folder, number, *arguments):
    return BackgroundCommand(
        ["python", "launcher/evaluate.py", str(folder / "runs" / "run"), "--watch", *arguments],
        folder / f"watch-{number}.log",
    )


def results(folder):
    path = folder / "runs" / "run" / "evaluation" / "results.jsonl"
    return [(result["task"], result["step"]) for result in read_complete_lines(path)]


@pytest.fixture(scope="module")
def watched(folder):
    """Train the run, evaluate its checkpoints with a watcher that is killed twice, and return the run folder.

    The first kill comes during an evaluation, the second right after a result.
    """
    first = start_watch(folder, 1)
    first.wait_until(
        lambda: f"waiting for the run {folder / 'runs' / 'run'} to start" in first.log.read_text(), "the wait"
    )
    run_command(["python", "launcher/run.py", str(folder / "run.yaml")])
    first.wait_until(lambda: "evaluating loss at step 10" in first.log.read_text(), "an evaluation")
    first.kill()
    second = start_watch(folder, 2)
    second.wait_until(lambda: results(folder), "a result")
    second.kill()
    last = start_watch(folder, 3)
    assert last.end() == 0, last.log.read_text()
    return folder / "runs" / "run"


def test_a_killed_watch_neither_repeats_nor_loses_a_result(folder, watched):
    assert results(folder) == [("loss", 10), ("loss", 20), ("loss", 30)]
    assert not list((watched / "checkpoints" / PINS).iterdir())
    assert "validation/embedding/retrieval_at_1" in (folder / "watch-3.log").read_text()


def test_two_processes_give_the_same_answers_as_one(folder, watched):
    answers, metrics = {}, {}
    for ranks, name in ((1, "one"), (2, "two")):
        test = write_pairs(folder / f"{name}.jsonl", "test", 25)
        run_command(
            ranks_command(ranks, "launcher/evaluate.py", watched, "--task", "rotten_tomatoes", f"task.test={test}")
        )
        answers[name] = (watched / "evaluation" / "answers" / "rotten_tomatoes-step-00000030.jsonl").read_text()
        metrics[name] = read_lines(watched / "evaluation" / "results.jsonl")[-1]["metrics"]
    assert answers["one"] == answers["two"] and metrics["one"] == metrics["two"]
    assert len(answers["one"].splitlines()) == 25 and results(folder)[-2:] == [("rotten_tomatoes", 30)] * 2


def test_a_checkpoint_that_is_seen_after_its_pin_survives_retention(tmp_path, monkeypatch):
    """Pin a checkpoint, and then check whether it exists, at all moments of a retention.

    The moments are before each call that reads or changes the folder, and after the end. A checkpoint that is seen may
    disappear for a moment, but comes back. A checkpoint that is not seen may be lost.
    """

    def act_before(act, call):
        return lambda *arguments, **options: (act(), call(*arguments, **options))[1]

    outcomes = set()
    for pinned, looked in itertools.combinations_with_replacement(range(8), 2):
        run_dir, moments, seen = tmp_path / f"{pinned}-{looked}", itertools.count(), []

        def act(run_dir=run_dir, moments=moments, seen=seen, pinned=pinned, looked=looked):
            moment = next(moments)
            if moment == pinned:
                request_evaluation(run_dir, 1)
            if moment == looked:
                seen.append(1 in list_steps(run_dir / "checkpoints"))
            return moment

        for step in (1, 2):
            (run_dir / "checkpoints" / step_name(step)).mkdir(parents=True)
        with monkeypatch.context() as patch:
            for module, name in (
                (checkpoint, "list_steps"),
                (checkpoint, "_pins"),
                (os, "replace"),
                (shutil, "rmtree"),
            ):
                patch.setattr(module, name, act_before(act, getattr(module, name)))
            prune(run_dir / "checkpoints", 1, None)
        while act() < 8:
            pass
        outcomes.add((seen[0], 1 in list_steps(run_dir / "checkpoints")))
    assert outcomes == {(True, True), (False, True), (False, False)}


def test_the_last_checkpoint_of_a_finished_run_is_evaluated_for_any_interval(folder, tmp_path):
    config = load_config(folder / "run.yaml", ["evaluation.every=10"])
    watcher = CheckpointWatcher(tmp_path, lambda: (config, config.evaluation.tasks), [])
    for step in (10, 15, 20, 25):
        (tmp_path / "checkpoints" / step_name(step)).mkdir(parents=True)
    watcher.pin_new_checkpoints()
    assert watcher.pinned() == [10, 20]
    watcher.finished = True
    watcher.pin_new_checkpoints()
    assert watcher.pinned() == [10, 20, 25]


def test_a_failed_evaluation_is_retried_once_and_a_rewind_resets_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.evaluation.watch.RETRY_SECONDS", TIMEOUT)
    config = load_config(folder / "run.yaml", [f"evaluation.tasks.0.test={tmp_path / 'absent.jsonl'}"])
    watcher = CheckpointWatcher(tmp_path, lambda: (config, config.evaluation.tasks), [])
    pins = tmp_path / "checkpoints" / PINS

    def save(step: int) -> None:
        (tmp_path / "checkpoints" / step_name(step)).mkdir(parents=True)
        (tmp_path / "export" / step_name(step)).mkdir(parents=True)

    for step in (10, 20, 30):
        save(step)
    watcher.pin_new_checkpoints()
    watcher.evaluate_pinned(20)
    assert watcher.pinned() == [10, 20, 30] and watcher.ready() == [10, 30] and not watcher.failed_steps
    watcher.evaluate_pinned(30)
    watcher.evaluate_pinned(30)  # the second try, which comes after a pause
    assert watcher.pinned() == [10, 20] and watcher.failed_steps == {30} and not (pins / step_name(30)).exists()

    assert rewind(tmp_path, 22, 12.0) == 20  # step 30 will get a new checkpoint, and step 20 keeps its checkpoint
    watcher.pin_new_checkpoints()
    assert watcher.ready() == [10] and not watcher.failed_steps
    assert rewind(tmp_path, 18, 12.0) == 10
    save(20)
    watcher.pin_new_checkpoints()
    assert watcher.ready() == [10, 20]
    watcher.evaluate_pinned(20)
    assert watcher.pinned() == [10, 20], "the new checkpoint of step 20 has failed only once"

    (pins / step_name(10)).unlink()  # another job has evaluated step 10, and retention has removed it
    (tmp_path / "checkpoints" / step_name(10)).rmdir()
    watcher.evaluate_pinned(10)
    assert not watcher.failed_steps and watcher.pinned() == [20]


def test_a_request_survives_one_failed_evaluation(folder, watched):
    request_evaluation(watched, 20)
    for still_pinned in (True, False):
        done = run_command(
            [
                "python",
                "launcher/evaluate.py",
                str(watched),
                "--pending",
                f"evaluation.tasks.0.test={folder / 'absent.jsonl'}",
            ],
            check=False,
        )
        assert done.returncode == 2 and "absent.jsonl" in done.stderr
        assert (watched / "checkpoints" / PINS / step_name(20)).exists() == still_pinned


def test_a_wrong_option_is_one_error_line(folder, watched):
    done = run_command(["python", "launcher/evaluate.py", str(watched), "--watch", "--checkpoint", "20"], check=False)
    assert (
        done.returncode == 2
        and done.stderr == "error: --watch evaluates every checkpoint; remove --checkpoint and --pending\n"
    )


@pytest.mark.slow
def test_random_kills_during_finetuning_change_no_result(folder, watched):
    """Check that each result appears once and equals the result of an undisturbed evaluation."""
    run_dir, draw = folder / "runs" / "run", random.Random(5)
    train, test = write_pairs(folder / "train.jsonl", "finetune", 300), write_pairs(folder / "test.jsonl", "test", 20)
    options = ["--task", "nl_rx", f"task.train={train}", f"task.test={test}", "task.finetune={steps: 40}"]
    for number in range(8):
        watch = start_watch(folder, f"random-{number}", *options)
        time.sleep(draw.uniform(5, 60))
        if watch.process.poll() is None:
            watch.process.kill()  # its children must end without being killed
        watch.process.wait()
    last = start_watch(folder, "random-last", *options)
    last.process.wait(TIMEOUT)
    found = [result for result in read_lines(run_dir / "evaluation" / "results.jsonl") if result["finetune"]]
    assert sorted(result["step"] for result in found) == [10, 20, 30], last.log.read_text()
    assert not list((run_dir / "checkpoints" / PINS).iterdir())
    again = write_pairs(folder / "again.jsonl", "test", 20)
    run_command(
        [
            "python",
            "launcher/evaluate.py",
            str(run_dir),
            *options[:3],
            f"task.test={again}",
            options[-1],
            "--checkpoint",
            "20",
        ]
    )
    lines = read_lines(run_dir / "evaluation" / "results.jsonl")
    assert json.dumps(lines[-1]["metrics"]) == json.dumps(
        next(result["metrics"] for result in found if result["step"] == 20)
    )
