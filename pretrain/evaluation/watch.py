"""Evaluation of each new checkpoint of a run, once, on this machine or on another one with access to the run folder.

Only results.jsonl records what is done, so a watch that is killed at any point resumes when it is started again. The
run may start its own evaluation jobs in the background at the same time: the lock and results.jsonl keep a checkpoint
from being evaluated twice.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.utils.console import UserError, report
from pretrain.config import RunConfig
from pretrain.evaluation.checkpoints import evaluate_step, evaluation_lock, unpin_if_done
from pretrain.evaluation.results import evaluated_steps
from pretrain.run_folder import PINS, list_steps, read_rewinds, read_status, step_name
from pretrain.tasks.options import TaskConfig
from pretrain.training.evaluation_requests import request_evaluation, requested_evaluations

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""Interval between checks of the run directory, in seconds."""
RETRY_SECONDS = 60.0
"""Seconds to wait before a failed evaluation is retried; by then, memory may be free again."""


class CheckpointWatcher:
    """The state of a watch: a background thread pins new checkpoints, and the main thread evaluates them."""

    def __init__(
        self, run_dir: Path, load_settings: Callable[[], tuple[RunConfig, list[TaskConfig]]], overrides: list[str]
    ):
        self.run_dir, self.load_settings, self.overrides = run_dir, load_settings, overrides
        self.settled: set[int] = set()
        """Steps that have been evaluated, or whose evaluation has been given up on."""
        self.skipped_steps: set[int] = set()
        """Steps that are not multiples of evaluation.every.

        They are not evaluated, except the last step of a finished run.
        """
        self.rewind_count = 0
        self.finished = False
        self.failed_steps: set[int] = set()
        self.retry_at: dict[int, float] = {}
        """Time of the next attempt at each failed step, in seconds of time.monotonic()."""
        self.ended = threading.Event()

    def pin_new_checkpoints(self) -> None:
        """Pin each checkpoint that exists, is to be evaluated and has no results.

        The pin is set before the check that the checkpoint still exists. Retention checks for pins again after it has
        moved a checkpoint away, and restores a pinned one (`prune` in training/checkpoint.py).
        """
        rewinds = read_rewinds(self.run_dir)
        for rewind in rewinds[self.rewind_count :]:
            self.settled = {step for step in self.settled if step <= rewind["to"]}
            self.failed_steps = {step for step in self.failed_steps if step <= rewind["to"]}
            self.retry_at = {step: retry_time for step, retry_time in self.retry_at.items() if step <= rewind["to"]}
        self.rewind_count = len(rewinds)
        checkpoints = self.run_dir / "checkpoints"
        pinned = requested_evaluations(self.run_dir)
        existing = list_steps(checkpoints)
        last = existing[-1:] if self.finished else []
        ignored = set(pinned) | self.settled | (self.skipped_steps - set(last))
        new = [step for step in existing if step not in ignored]
        if not new:
            return
        config, tasks = self.load_settings()
        done = evaluated_steps(self.run_dir, tasks, self.overrides)
        for step in new:
            if step in done:
                self.settled.add(step)
                continue
            if config.evaluation.every and step % config.evaluation.every and step not in last:
                self.skipped_steps.add(step)
                continue
            request_evaluation(self.run_dir, step)
            # If the checkpoint has been removed meanwhile, unpin it. If retention restores it, the next check pins it.
            if step not in list_steps(checkpoints):
                (checkpoints / PINS / step_name(step)).unlink(missing_ok=True)

    def keep_pinning(self) -> None:
        """Pin new checkpoints until the watch ends; the background thread runs this."""
        while not self.ended.wait(POLL_SECONDS):
            # Ignore errors here: the main thread calls the same function and reports them.
            with contextlib.suppress(OSError, UserError):
                self.pin_new_checkpoints()

    def pinned(self) -> list[int]:
        """Return the pinned steps that are not settled, including pins of other jobs and of a killed watch."""
        return [step for step in requested_evaluations(self.run_dir) if step not in self.settled]

    def ready(self) -> list[int]:
        """Return the pinned steps that can be evaluated now: all except those still waiting for a retry."""
        return [step for step in self.pinned() if self.retry_at.get(step, 0) <= time.monotonic()]

    def evaluate_pinned(self, step: int) -> None:
        """Evaluate a pinned checkpoint, unless another job has done so by now.

        The pin is removed when all tasks are done or have been given up on.
        """
        config, tasks = self.load_settings()
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
            self.retry_at[step] = time.monotonic() + RETRY_SECONDS
            logger.warning(f"the evaluation of step {step} failed; trying again in {RETRY_SECONDS:.0f} s")
        if failures and settled:
            self.failed_steps.add(step)


def watch(run_dir: Path, load_settings: Callable[[], tuple[RunConfig, list[TaskConfig]]], overrides: list[str]) -> None:
    """Evaluate checkpoints until the run is finished or has failed permanently.

    These are the checkpoints at multiples of evaluation.every (0 means all), and the last one of a finished run.
    `load_settings` returns the configuration and the tasks; it is only called once the run has written config.yaml.
    Raises UserError at the end if an evaluation failed.
    """
    if not (run_dir / "config.yaml").exists():
        logger.info(
            f"waiting for the run {run_dir} to start" + ("" if run_dir.exists() else "; there is no such folder yet")
        )
    while not (run_dir / "config.yaml").exists():
        time.sleep(POLL_SECONDS)
    config, tasks = load_settings()
    every = config.evaluation.every
    checkpoints = f"the checkpoint of every {every} steps, and the last one" if every else "every checkpoint"
    logger.info(f"watching {run_dir} to evaluate {', '.join(task.title for task in tasks)} on {checkpoints}")
    watcher = CheckpointWatcher(run_dir, load_settings, overrides)
    printed = ""
    threading.Thread(target=watcher.keep_pinning, daemon=True).start()
    while True:
        # The status is read before the checkpoints: if the run is finished, its last checkpoint exists by then.
        status = read_status(run_dir)
        watcher.finished = status.get("status") == "finished"
        watcher.pin_new_checkpoints()
        if todo := watcher.ready():
            watcher.evaluate_pinned(todo[0])
            continue
        failed_permanently = status.get("status") == "failed" and not status.get("again", True)
        if not watcher.pinned() and (watcher.finished or failed_permanently):
            break
        if (line := _describe_wait(status)) != printed:
            printed = line
            logger.info(line)
        time.sleep(POLL_SECONDS)
    watcher.ended.set()
    if watcher.failed_steps:
        failed = ", ".join(map(str, sorted(watcher.failed_steps)))
        raise UserError(
            f"the run has {status['status']}, but the evaluation of these steps failed: {failed}; fix the errors "
            f"above, then run launcher/evaluate.py {run_dir} --checkpoint STEP for each of them"
        )


def _describe_wait(status: dict[str, Any]) -> str:
    match status.get("status"):
        case "failed" | "resumable" as ended:
            state = "has failed" if ended == "failed" else "has stopped and can be resumed"
            return (
                f"the run {state} at step {status['step']} ({status.get('reason') or 'no reason recorded'}); "
                "waiting for it to resume; press Ctrl-C to end the watch"
            )
        case _:
            return "waiting for the next checkpoint"
