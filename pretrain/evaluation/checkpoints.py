"""Evaluation of all tasks on one checkpoint, by one job at a time."""

import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.utils.console import UserError, file_system_error
from data_prep.utils.files import try_lock
from pretrain.config import RunConfig
from pretrain.evaluation.results import evaluated_steps
from pretrain.imports import libraries
from pretrain.run_folder import EVALUATION_LOCK, PINS, step_name
from pretrain.tasks.options import TaskConfig

logger = logging.getLogger(__name__)

ATTEMPTS = 2
"""Number of attempts at a checkpoint whose evaluation fails."""


@contextmanager
def evaluation_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of the run's evaluations; wait if another job has it, for example one in the background.

    The lock is a flock on evaluation/.lock, and the system releases it when the process ends. It works between machines
    if the file system shares such locks. NFS does so from version 3 on with its lock service, and Lustre does so if it
    is mounted with the option flock.
    """
    (run_dir / "evaluation").mkdir(exist_ok=True)
    path = run_dir / EVALUATION_LOCK
    lock = try_lock(path)
    if lock is None:
        logger.info(
            f"waiting for another evaluation of {run_dir} to end; if it runs in the background, "
            f"its log is {path.parent / 'log.txt'}"
        )
    while lock is None:
        time.sleep(1)
        lock = try_lock(path)
    with lock:
        yield


def unpin_checkpoint(
    run_dir: Path, config: RunConfig, tasks: list[TaskConfig], step: int, overrides: list[str]
) -> None:
    """Remove the pin of a checkpoint when these tasks are done or have been given up on.

    The pin remains if the run itself has requested other evaluations of the step and their results are missing. A job
    of the run then finds the pin and evaluates the step.
    """
    requested_by_run = config.evaluation.every and step % config.evaluation.every == 0
    differs = tasks != config.evaluation.tasks or overrides
    pending = requested_by_run and differs and step not in evaluated_steps(run_dir, config.evaluation.tasks)
    if not pending:
        (run_dir / "checkpoints" / PINS / step_name(step)).unlink(missing_ok=True)


def unpin_if_done(
    run_dir: Path, config: RunConfig, tasks: list[TaskConfig], step: int, overrides: list[str], failed: bool
) -> bool:
    """Unpin a checkpoint that has been evaluated or has failed ATTEMPTS times; return whether this is the case.

    The pin file counts the failures of all jobs.
    """
    if failed:
        pin = run_dir / "checkpoints" / PINS / step_name(step)
        with open(pin, "ab") as file:
            file.write(b"!")
        if pin.stat().st_size < ATTEMPTS:
            return False
    unpin_checkpoint(run_dir, config, tasks, step, overrides)
    return True


def evaluate_step(
    run_dir: Path, config: RunConfig, tasks: list[TaskConfig], step: int, overrides: list[str]
) -> list[Exception]:
    """Evaluate all tasks on a checkpoint, and return the exceptions of the tasks that failed.

    The caller has pinned the checkpoint and holds the lock.
    """
    with libraries():
        from pretrain.evaluation.task_evaluation import evaluate_task

    failures: list[Exception] = []
    for task in tasks:
        try:
            evaluate_task(config, run_dir, task, step, overrides)
        except Exception as error:
            known = error if isinstance(error, UserError) else file_system_error(error)
            failures.append(known or error)
            if known is None:
                traceback.print_exception(error)
    return failures
