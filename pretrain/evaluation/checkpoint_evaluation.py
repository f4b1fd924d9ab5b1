"""All tasks on one checkpoint."""

import time
from pathlib import Path

from pretrain.config import RunConfig, TaskConfig
from pretrain.evaluation.export import export_checkpoint
from pretrain.evaluation.results import append_result, read_results
from pretrain.evaluation.tasks import TASKS
from pretrain.evaluation.tasks.task_run import TaskRun


def evaluate_checkpoint(config: RunConfig, run_dir: Path, tasks: list[TaskConfig], step: int) -> None:
    """Export the checkpoint and run each task on it that has no result with the same settings yet."""
    export = export_checkpoint(run_dir, step)
    for task in tasks:
        settings = task.model_dump(mode="json", exclude_none=True, exclude={"name"})
        identity = {"step": step, "task": task.name, "settings": settings}
        if any(identity.items() <= result.items() for result in read_results(run_dir)):
            print(f"{task.name} at step {step} is evaluated already", flush=True)
            continue
        print(f"evaluating {task.name} at step {step}", flush=True)
        started = time.perf_counter()
        result = TASKS[task.name](TaskRun(config, task, step, export, run_dir / "evaluation"))
        append_result(run_dir, {
            "step": step, "task": task.name, "pretrain_seed": config.seed,
            "finetune_seed": config.seed if task.finetune is not None else None,
            "finetune": task.finetune, "rows": result.rows, "metrics": result.metrics, "settings": settings,
            "seconds": round(time.perf_counter() - started, 1),
        })
        print(f"{task.name} at step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()), flush=True)
