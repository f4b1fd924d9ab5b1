"""Following a run: each checkpoint is evaluated once, as it comes, from this machine or another one that sees the same files.

What is done stands in results.jsonl alone, so a watch that is killed at any point goes on where it was when it is started again. Jobs that the
run itself starts in the background may work beside it: the lock and results.jsonl share the work out.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.console import UserError, print_now, report
from pretrain.config import RunConfig
from pretrain.evaluation.checkpoints import evaluate_step, evaluation_lock, unpin_if_done
from pretrain.evaluation.results import evaluated_steps
from pretrain.run_folder import PINS, list_steps, read_rewinds, read_status, step_name
from pretrain.tasks.options import TaskConfig
from pretrain.training.evaluation_requests import request_evaluation, requested_evaluations

POLL = 2.0
"""Seconds between looks at the run directory."""
PAUSE = 60.0
"""Seconds before another attempt at a checkpoint that could not be evaluated: memory may be free again by then."""


class CheckpointWatcher:
    """One watch: a thread pins what comes, while the main one evaluates."""

    def __init__(self, run_dir: Path, read: Callable[[], tuple[RunConfig, list[TaskConfig]]], overrides: list[str]):
        self.run_dir, self.read, self.overrides = run_dir, read, overrides
        self.settled: set[int] = set()
        """Steps that are done or given up."""
        self.passed_over: set[int] = set()
        """Steps that evaluation.every does not divide; the last of a finished run is wanted nevertheless."""
        self.rewinds = 0
        self.finished = False
        self.failed_steps: set[int] = set()
        self.not_before: dict[int, float] = {}
        """When a step that failed is tried again, in seconds of time.monotonic()."""
        self.ended = threading.Event()

    def pin_new_checkpoints(self) -> None:
        """Pin each wanted checkpoint that stands without its results.

        The pin comes first, then the look whether the checkpoint still stands: retention looks for pins again when it has moved one away, and
        puts it back (`prune` of training/checkpoint.py).
        """
        gone_back = read_rewinds(self.run_dir)
        for rewind in gone_back[self.rewinds :]:
            for known in (self.settled, self.failed_steps):
                known.intersection_update({step for step in known if step <= rewind["to"]})
            self.not_before = {step: at for step, at in self.not_before.items() if step <= rewind["to"]}
        self.rewinds = len(gone_back)
        checkpoints = self.run_dir / "checkpoints"
        pinned = requested_evaluations(self.run_dir)
        steps = list_steps(checkpoints)
        last = steps[-1:] if self.finished else []
        new = [
            step
            for step in steps
            if step not in pinned and step not in self.settled and (step not in self.passed_over or step in last)
        ]
        if not new:
            return
        config, tasks = self.read()
        done = evaluated_steps(self.run_dir, tasks, self.overrides)
        for step in new:
            if step in done:
                self.settled.add(step)
                continue
            if config.evaluation.every and step % config.evaluation.every and step not in last:
                self.passed_over.add(step)
                continue
            request_evaluation(self.run_dir, step)
            if step not in list_steps(checkpoints):
                (checkpoints / PINS / step_name(step)).unlink(missing_ok=True)  # gone, or on its way back

    def keep_pinning(self) -> None:
        """The thread."""
        while not self.ended.wait(POLL):
            with contextlib.suppress(OSError, UserError):  # which the main thread meets too
                self.pin_new_checkpoints()

    def pinned(self) -> list[int]:
        """What is to be evaluated, whoever has pinned it: also what a killed watch has left."""
        return [step for step in requested_evaluations(self.run_dir) if step not in self.settled]

    def ready(self) -> list[int]:
        """The same without those that have just failed."""
        return [step for step in self.pinned() if self.not_before.get(step, 0) <= time.monotonic()]

    def evaluate_pinned(self, step: int) -> None:
        """Evaluate a pinned checkpoint, unless that has been done meanwhile; the pin goes when all is done or given up."""
        config, tasks = self.read()
        with evaluation_lock(self.run_dir):
            if step not in requested_evaluations(self.run_dir):
                return
            failures = evaluate_step(self.run_dir, config, tasks, step, self.overrides)
            settled = unpin_if_done(self.run_dir, config, tasks, step, self.overrides, bool(failures))
        for failure in failures:
            if isinstance(failure, UserError):
                report(failure)
        if settled:
            self.settled.add(step)
        else:
            self.not_before[step] = time.monotonic() + PAUSE
            print_now(f"step {step} could not be evaluated; trying again in {PAUSE:.0f} s")
        if failures and settled:
            self.failed_steps.add(step)


def watch(run_dir: Path, read: Callable[[], tuple[RunConfig, list[TaskConfig]]], overrides: list[str]) -> None:
    """Evaluate every checkpoint that evaluation.every divides (0: all of them), and the last, until the run is finished, or failed for good.

    `read` gives the configuration and the tasks, once there is one. Raises UserError at the end where some evaluation failed.
    """
    if not (run_dir / "config.yaml").exists():
        print_now(
            f"waiting for the run {run_dir} to start" + ("" if run_dir.exists() else "; there is no such folder yet")
        )
    while not (run_dir / "config.yaml").exists():
        time.sleep(POLL)
    config, tasks = read()
    print_now(
        f"watching {run_dir}: {', '.join(task.title for task in tasks)} on "
        + (
            f"the checkpoints of every {config.evaluation.every} steps and the last"
            if config.evaluation.every
            else "every checkpoint"
        )
    )
    watching, told = CheckpointWatcher(run_dir, read, overrides), ""
    threading.Thread(target=watching.keep_pinning, daemon=True).start()
    while True:
        status = read_status(
            run_dir
        )  # before the look at the checkpoints: what a finished run has saved stands by then
        watching.finished = status.get("status") == "finished"
        watching.pin_new_checkpoints()
        if todo := watching.ready():
            watching.evaluate_pinned(todo[0])
            continue
        if not watching.pinned() and (
            watching.finished or (status.get("status") == "failed" and not status.get("again", True))
        ):
            break
        if (line := _why_waiting(status)) != told:
            told = line
            print_now(line)
        time.sleep(POLL)
    watching.ended.set()
    if watching.failed_steps:
        raise UserError(
            f"the run has {status['status']}; not evaluated: steps {', '.join(map(str, sorted(watching.failed_steps)))}, for reasons that "
            "stand above"
        )


def _why_waiting(status: dict[str, Any]) -> str:
    match status.get("status"):
        case "failed" | "resumable" as ended:
            return (
                f"the run is {ended} at step {status['step']} ({status.get('reason') or 'no reason given'}): waiting for it to go on; "
                "Ctrl-C ends the watch"
            )
        case _:
            return "waiting for the next checkpoint"
