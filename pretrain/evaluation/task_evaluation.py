"""One task on one checkpoint."""

import time
from pathlib import Path

from pretrain.config import RunConfig, TaskConfig, load_config
from pretrain.evaluation.directions import direction
from pretrain.evaluation.export import export_checkpoint
from pretrain.evaluation.results import append_result, identity, is_evaluated
from pretrain.evaluation.tasks import TASKS
from pretrain.evaluation.tasks.task_run import TaskRun
from pretrain.run_folder import rewinds


def evaluate_task(config: RunConfig, run_dir: Path, task: TaskConfig, step: int, overrides: list[str]) -> None:
    """Export the checkpoint and run the task on it, unless the same was done: same step, settings, files and overrides."""
    if is_evaluated(run_dir, task, step, overrides):
        print(f"{task.title} at step {step} is evaluated already", flush=True)
        return
    print(f"evaluating {task.title} at step {step}", flush=True)
    started, gone_back = time.perf_counter(), len(rewinds(run_dir))
    result = TASKS[task.name](TaskRun(config, task, step, export_checkpoint(run_dir, step), run_dir / "evaluation"))
    declared = {name: found for name in result.metrics if (found := result.directions.get(name) or direction(task.name, name))}
    append_result(run_dir, identity(task, step, overrides) | {
        "pretrain_seed": load_config(run_dir / "config.yaml").seed,
        "finetune_seed": config.seed if task.finetune is not None else None,
        "finetune": task.finetune, "rewinds": gone_back, "rows": result.rows, "metrics": result.metrics, "directions": declared,
        "counts": result.counts,
        "seconds": round(time.perf_counter() - started, 1),
    }, config.monitor.tensorboard)
    counts = [f"{name} {count:,}" for name, count in result.counts.items() if count]
    print(f"{task.title} at step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
          + (f"; of {result.rows:,} rows: {', '.join(counts)}" if counts else ""), flush=True)
