"""The evaluation command. It loads no model before it holds the lock, so that a waiting job costs little."""

import argparse
import os
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.config_file import apply_overrides, validate
from data_prep.console import UserError, exit_on_user_error, print_now
from data_prep.files import try_lock
from pretrain.config import RunConfig, TaskConfig, load_config
from pretrain.evaluation.results import print_summary
from pretrain.run_folder import PINS, list_steps, step_name
from pretrain.training.background import ask_for_evaluation, evaluations_asked_for


def main() -> None:
    """Parse the command line and evaluate."""
    parser = argparse.ArgumentParser(description="Evaluate checkpoints of a run on downstream tasks.")
    parser.add_argument("run_dir", type=Path, help="folder of the run, or with --embed an export")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="dotted keys of the run's configuration, or task.KEY for the one task named by --task")
    parser.add_argument("--task", action="append", default=[], metavar="NAME", help="only this task; may be given several times")
    parser.add_argument("--checkpoint", default="latest", metavar="STEP|latest", help="which checkpoint; default latest")
    parser.add_argument("--embed", metavar="FILE", help="write the embeddings of this file's views instead, as arrays in EXPORT/embeddings")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed passes it
    parser.add_argument("--pending", action="store_true", help="the checkpoints that the run asked to evaluate, instead")
    arguments = parser.parse_intermixed_args()
    if int(os.environ.get("RANK", 0)):
        return  # started on several processes: one evaluates
    if arguments.embed is not None:
        exit_on_user_error(lambda: _embed(arguments))
        return
    exit_on_user_error(lambda: _evaluate(arguments))


def _embed(arguments: argparse.Namespace) -> None:
    if arguments.task or arguments.overrides or arguments.pending or arguments.checkpoint != "latest":
        raise UserError("--embed takes an export and a file, and nothing else")
    from pretrain.evaluation.embed import embed_file

    embed_file(arguments.run_dir, arguments.embed)


def _evaluate(arguments: argparse.Namespace) -> None:
    run_dir: Path = arguments.run_dir
    if not (run_dir / "config.yaml").exists():
        raise UserError(f"{run_dir} is no run directory: it holds no config.yaml")
    config = load_config(run_dir / "config.yaml", [word for word in arguments.overrides if not word.startswith("task.")])
    tasks = choose_tasks(config, arguments.task, [word for word in arguments.overrides if word.startswith("task.")])
    with _one_at_a_time(run_dir):
        asked_for = evaluations_asked_for(run_dir)
        steps = asked_for if arguments.pending else [_step(run_dir, arguments.checkpoint)]
        for step in set(steps) - set(asked_for):
            ask_for_evaluation(run_dir, step)  # so that it is not removed meanwhile
        done = asked_for if arguments.pending else set(steps) - set(asked_for)
        _evaluate_steps(arguments, config, tasks, steps, done)
    if not arguments.pending:
        print_summary(run_dir)


def choose_tasks(config: RunConfig, names: list[str], overrides: list[str]) -> list[TaskConfig]:
    """The tasks of the configuration, or those named; `task.KEY=VALUE` sets a key of the one named."""
    tasks = config.evaluation.tasks
    if names:
        known = {task.title: task.model_dump(exclude_none=True) for task in tasks}
        chosen = [known.get(name, {"name": name}) for name in names]
    else:
        chosen = [task.model_dump(exclude_none=True) for task in tasks]
    if not chosen:
        raise UserError("the run names no evaluation.tasks: choose one with --task NAME")
    if overrides:
        if len(chosen) != 1:
            raise UserError(f"{overrides[0]} addresses one task, but there are {len(chosen)}: choose it with --task NAME")
        apply_overrides({"task": chosen[0]}, overrides)
    tasks = [validate(TaskConfig, values, "task") for values in chosen]
    for task in tasks:
        try:
            task.check_views(config.data.views)
        except ValueError as error:
            raise UserError(str(error)) from None
    return tasks


def _step(run_dir: Path, wanted: str) -> int:
    steps = list_steps(run_dir / "checkpoints")
    if not steps:
        raise UserError(f"{run_dir} holds no checkpoint yet")
    if wanted == "latest":
        return steps[-1]
    if not wanted.isdigit() or int(wanted) not in steps:
        raise UserError(f"{run_dir} holds no checkpoint of step {wanted}; it has {', '.join(map(str, steps))}")
    return int(wanted)


@contextmanager
def _one_at_a_time(run_dir: Path) -> Iterator[None]:
    """Hold the lock of the run's evaluations; wait for a job that runs, for instance in the background."""
    (run_dir / "evaluation").mkdir(exist_ok=True)
    path = run_dir / "evaluation" / ".lock"
    lock = try_lock(path)
    if lock is None:
        print_now(f"waiting for another evaluation of {run_dir} to end; if it runs in the background, its log is {path.parent / 'log.txt'}")
    while lock is None:
        time.sleep(1)
        lock = try_lock(path)
    with lock:
        yield


def _evaluate_steps(arguments: argparse.Namespace, config: RunConfig, tasks: list[TaskConfig], steps: list[int], done: Collection[int]) -> None:
    """Evaluate all tasks on all steps, whatever happens to some; take back the requests of the steps in `done`."""
    if not steps:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils.logging import disable_progress_bar

    from pretrain.evaluation.task_evaluation import evaluate_task

    disable_progress_bar()

    failures: list[Exception] = []
    for step in steps:
        for task in tasks:
            try:
                evaluate_task(config, arguments.run_dir, task, step, arguments.overrides)
            except Exception as error:
                failures.append(error)
                if not isinstance(error, UserError):
                    traceback.print_exception(error)
        if step in done:
            (arguments.run_dir / "checkpoints" / PINS / step_name(step)).unlink(missing_ok=True)
    if failures:
        raise failures[0]
