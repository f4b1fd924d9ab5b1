"""Evaluation of one task on one checkpoint."""

import importlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from data_prep.utils.progress import saved_progress
from pretrain.config import RunConfig, load_config
from pretrain.evaluation.export import export_checkpoint
from pretrain.evaluation.results import append_result, is_evaluated, read_results, result_key
from pretrain.evaluation.task_run import CheckpointTask
from pretrain.run_folder import EVALUATION_PROGRESS, read_rewinds
from pretrain.tasks.directions import direction
from pretrain.tasks.options import AnswerTask, TaskConfig
from pretrain.tasks.scoring import TaskResult
from pretrain.training.loggers import send_evaluations, trackers

logger = logging.getLogger(__name__)


def find_evaluation(name: str) -> Callable[[CheckpointTask], TaskResult]:
    """Return the function `evaluate` of a task.

    It is in the task's file in pretrain/tasks, or in model_tasks for a task that needs the model itself.
    """
    module = importlib.import_module(f"pretrain.tasks.{name}")
    if not hasattr(module, "evaluate"):
        module = importlib.import_module(f"pretrain.evaluation.model_tasks.{name}")
    evaluate: Callable[[CheckpointTask], TaskResult] = module.evaluate
    return evaluate


def evaluate_task(config: RunConfig, run_dir: Path, task: TaskConfig, step: int, overrides: list[str]) -> None:
    """Export the checkpoint, run the task on it and add the result.

    Nothing is done if there is a result with the same step, settings, files and overrides.
    """
    if is_evaluated(run_dir, task, step, overrides):
        logger.info(f"{task.title} at step {step} has already been evaluated")
        return
    logger.info(f"evaluating {task.title} at step {step}")
    started = time.perf_counter()
    rewinds = len(read_rewinds(run_dir))
    evaluate = find_evaluation(task.name)
    with saved_progress(run_dir / EVALUATION_PROGRESS, f"evaluating {task.title} at step {step}"):
        result = evaluate(CheckpointTask(config, task, step, export_checkpoint(run_dir, step), run_dir / "evaluation"))
    declared = {
        name: declared_direction
        for name in result.metrics
        if (declared_direction := result.directions.get(name) or direction(task.name, name))
    }
    append_result(
        run_dir,
        result_key(task, step, overrides)
        | {
            "pretrain_seed": load_config(run_dir / "config.yaml").seed,
            "finetune_seed": config.seed if task.finetunes else None,
            "finetune": task.finetune if isinstance(task, AnswerTask) else None,
            "rewinds": rewinds,
            "rows": result.rows,
            "metrics": result.metrics,
            "directions": declared,
            "counts": result.counts,
            "seconds": round(time.perf_counter() - started, 1),
        },
        "tensorboard" in config.monitor.loggers,
    )
    if trackers(config):
        send_evaluations(config, run_dir, read_results(run_dir))
    counts = [f"{name} {count:,}" for name, count in result.counts.items() if count or name == "unseen"]
    print(
        f"{task.title} at step {step}: "
        + ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        + (f"; of {result.rows:,} rows: {', '.join(counts)}" if counts else ""),
        flush=True,
    )
