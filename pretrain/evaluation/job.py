"""The evaluation command. It loads a model only when it holds the lock, so a waiting job needs few resources."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from data_prep.utils.config_file import apply_overrides
from data_prep.utils.console import UserError, exit_on_user_error, ignore_output_errors
from data_prep.utils.launch_env import launched_process_count
from pretrain.config import RunConfig, check_task, load_config, parse_task
from pretrain.evaluation.checkpoints import (
    evaluate_step,
    evaluation_lock,
    unpin_checkpoint,
    unpin_if_done,
)
from pretrain.evaluation.summary import print_summary
from pretrain.evaluation.watch import watch
from pretrain.imports import libraries
from pretrain.run_folder import list_steps
from pretrain.tasks.options import TaskConfig
from pretrain.training.evaluation_requests import request_evaluation, requested_evaluations


def main() -> None:
    """Parse the command line and evaluate."""
    arguments = _parser().parse_intermixed_args()
    actions = (
        (arguments.embed, _embed),
        (arguments.export, _export),
        (arguments.sentence_transformers, _sentence_transformers),
        (arguments.push, _push),
    )
    for chosen, action in actions:
        if chosen:
            if int(os.environ.get("RANK", 0)) == 0:
                exit_on_user_error(lambda: action(arguments))  # noqa: B023 (called at once)
            return
    with ignore_output_errors():  # a full disk under the log must not end an evaluation
        exit_on_user_error(lambda: _run_on_all_ranks(lambda: _evaluate(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Evaluate checkpoints of a run on downstream tasks.")
    parser.add_argument(
        "run_dir",
        type=Path,
        help="folder of the run; with --embed or --sentence-transformers, folder of an export",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="override of a dotted key of the run's configuration, or of task.KEY for the task given by --task",
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME",
        help="evaluate only this task; may be repeated; default: all tasks of the run",
    )
    parser.add_argument(
        "--checkpoint",
        "--step",
        default="latest",
        metavar="STEP|latest",
        help="checkpoint to evaluate; default: latest",
    )
    parser.add_argument(
        "--embed",
        metavar="FILE",
        help="instead of evaluating tasks, write the embeddings of the views of FILE, or of a source as in task.test, "
        "to EXPORT/embeddings",
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FOLDER",
        help="instead of evaluating tasks, export the checkpoint to a new folder",
    )
    parser.add_argument(
        "--sentence-transformers",
        type=Path,
        metavar="FOLDER",
        help="instead of evaluating tasks, write a folder for sentence-transformers for each view of EXPORT, and for "
        "each prediction, into a new folder",
    )
    parser.add_argument(
        "--push",
        action="store_true",
        help="instead of evaluating tasks, push an export of the newest checkpoint to export.hub",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed passes it
    parser.add_argument("--pending", action="store_true", help="evaluate the checkpoints that the run has requested")
    parser.add_argument("--watch", action="store_true", help="evaluate every new checkpoint until the run is finished")
    return parser


def _run_on_all_ranks(evaluate: Callable[[], None]) -> None:
    """Evaluate on rank 0, with its peers as workers."""
    if max(int(os.environ.get("WORLD_SIZE", 1)), launched_process_count()) == 1:
        evaluate()
        return
    with libraries():
        from pretrain.evaluation.workers import run_with_workers

    run_with_workers(evaluate)


def _embed(arguments: argparse.Namespace) -> None:
    if _other_options(arguments) or arguments.overrides or arguments.checkpoint != "latest":
        raise UserError("--embed allows only an export and a file; remove all other options and overrides")
    _check_export(arguments.run_dir)
    with libraries():
        from pretrain.evaluation.embed import embed_file

    embed_file(arguments.run_dir, arguments.embed)


def _export(arguments: argparse.Namespace) -> None:
    if _other_options(arguments) or arguments.overrides:
        raise UserError("--export allows only --step; remove all other options and overrides")
    _read_config(arguments)
    step = _find_step(arguments.run_dir, arguments.checkpoint, "checkpoints", "export")
    with libraries():
        from pretrain.evaluation.export import export_to

    export_to(arguments.run_dir, step, arguments.export)


def _sentence_transformers(arguments: argparse.Namespace) -> None:
    if _other_options(arguments) or arguments.overrides or arguments.checkpoint != "latest":
        raise UserError(
            "--sentence-transformers allows only an export and a new folder; remove all other options and overrides"
        )
    _check_export(arguments.run_dir)
    with libraries():
        from pretrain.evaluation.sentence_folders import write_sentence_folders

    write_sentence_folders(arguments.run_dir, arguments.sentence_transformers)


def _check_export(folder: Path) -> None:
    """Raise UserError if a folder is not an export, before torch is loaded."""
    if not (folder / "jepa.json").exists():
        raise UserError(f"{folder} is not an export: it has no jepa.json; use a folder in the folder export of a run")


def _push(arguments: argparse.Namespace) -> None:
    if _other_options(arguments) or arguments.checkpoint != "latest":
        raise UserError("--push pushes the newest checkpoint; remove all other options")
    config = _read_config(arguments)
    with libraries():
        from pretrain.evaluation.hub import push_now

    push_now(arguments.run_dir, config.hub)


def _other_options(arguments: argparse.Namespace) -> bool:
    """Return whether there are options that --embed, --export, --sentence-transformers and --push exclude."""
    folders = [arguments.embed, arguments.export, arguments.sentence_transformers]
    chosen = [*(folder is not None for folder in folders), arguments.push]
    return bool(arguments.task or arguments.pending or arguments.watch or sum(chosen) > 1)


def _evaluate(arguments: argparse.Namespace) -> None:
    run_dir: Path = arguments.run_dir
    if arguments.watch:
        if arguments.pending or arguments.checkpoint != "latest":
            raise UserError("--watch evaluates every checkpoint; remove --checkpoint and --pending")
        watch(run_dir, lambda: _read_config_and_tasks(arguments), arguments.overrides)
    else:
        if arguments.pending and arguments.checkpoint != "latest":
            raise UserError("--pending evaluates the checkpoints that the run has requested; remove --checkpoint")
        config, tasks = _read_config_and_tasks(arguments)
        with evaluation_lock(run_dir):
            requested = requested_evaluations(run_dir)
            steps = requested if arguments.pending else [_find_step(run_dir, arguments.checkpoint, "checkpoints")]
            for step in set(steps) - set(requested):
                request_evaluation(run_dir, step)  # prevents the removal of the checkpoint during the evaluation
            failures = []
            for step in steps:
                failed = evaluate_step(run_dir, config, tasks, step, arguments.overrides)
                failures += failed
                if arguments.pending:
                    unpin_if_done(run_dir, config, tasks, step, arguments.overrides, bool(failed))
                elif step not in requested:
                    unpin_checkpoint(run_dir, config, tasks, step, arguments.overrides)
        if failures:
            raise failures[0]
    if not arguments.pending:
        print_summary(run_dir)


def _read_config_and_tasks(arguments: argparse.Namespace) -> tuple[RunConfig, list[TaskConfig]]:
    """Return the configuration of the run and the chosen tasks."""
    config = _read_config(arguments)
    return config, choose_tasks(
        config, arguments.task, [word for word in arguments.overrides if word.startswith("task.")]
    )


def _read_config(arguments: argparse.Namespace) -> RunConfig:
    """Return the configuration of the run."""
    path = arguments.run_dir / "config.yaml"
    if not path.exists():
        raise UserError(f"{arguments.run_dir} is not a run directory: it has no config.yaml; use the folder of a run")
    return load_config(path, [word for word in arguments.overrides if not word.startswith("task.")])


def choose_tasks(config: RunConfig, names: list[str], overrides: list[str]) -> list[TaskConfig]:
    """Return the configured tasks, or only the tasks in `names`; `task.KEY=VALUE` sets a key of a single task.

    Raises UserError if there is no task, or if there are several and an override addresses one.
    """
    tasks = config.evaluation.tasks
    if names:
        configured = {task.title: task.model_dump(exclude_none=True) for task in tasks}
        chosen = [configured.get(name, {"name": name}) for name in names]
    else:
        chosen = [task.model_dump(exclude_none=True) for task in tasks]
    if not chosen:
        raise UserError("evaluation.tasks of the run is empty; choose a task with --task NAME")
    if overrides:
        if len(chosen) != 1:
            raise UserError(
                f"{overrides[0]} addresses one task, but there are {len(chosen)}; choose it with --task NAME"
            )
        apply_overrides({"task": chosen[0]}, overrides)
    tasks = [parse_task(values, "task") for values in chosen]
    for task in tasks:
        check_task(config, task, "task")
    return tasks


def _find_step(run_dir: Path, wanted: str, *folders: str) -> int:
    """Return the wanted step, which must be in one of the folders of the run."""
    steps = sorted({step for folder in folders for step in list_steps(run_dir / folder)})
    if not steps:
        raise UserError(f"{run_dir} has no checkpoints yet; wait for the first one")
    if wanted == "latest":
        return steps[-1]
    if not wanted.isdigit() or int(wanted) not in steps:
        raise UserError(f"{run_dir} has no checkpoint of step {wanted}; choose one of {', '.join(map(str, steps))}")
    return int(wanted)
