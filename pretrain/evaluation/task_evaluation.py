"""One task on one checkpoint."""

import time
from pathlib import Path

from data_prep.config import JsonSource
from data_prep.files import sha256_file
from pretrain.config import RunConfig, TaskConfig, load_config
from pretrain.evaluation.export import export_checkpoint
from pretrain.evaluation.results import append_result, read_results
from pretrain.evaluation.tasks import TASKS
from pretrain.evaluation.tasks.task_run import TaskRun


def evaluate_task(config: RunConfig, run_dir: Path, task: TaskConfig, step: int, overrides: list[str]) -> None:
    """Export the checkpoint and run the task on it, unless the same was done: same step, settings, files and overrides."""
    paths = [source.path if isinstance(source, JsonSource) else source for source in (task.train, task.test, task.databases)]
    settings = task.model_dump(mode="json", exclude_none=True, exclude={"name", "label"}) | {
        "files": {str(file): sha256_file(file) for path in paths if isinstance(path, str) for file in _files(Path(path))},
        "overrides": [word for word in overrides if not word.startswith("task.")],
    }
    identity = {"step": step, "task": task.title, "settings": settings}
    if any(identity.items() <= result.items() for result in read_results(run_dir)):
        print(f"{task.title} at step {step} is evaluated already", flush=True)
        return
    print(f"evaluating {task.title} at step {step}", flush=True)
    started = time.perf_counter()
    result = TASKS[task.name](TaskRun(config, task, step, export_checkpoint(run_dir, step), run_dir / "evaluation"))
    append_result(run_dir, {
        "step": step, "task": task.title, "pretrain_seed": load_config(run_dir / "config.yaml").seed,
        "finetune_seed": config.seed if task.finetune is not None else None,
        "finetune": task.finetune, "rows": result.rows, "metrics": result.metrics, "counts": result.counts, "settings": settings,
        "seconds": round(time.perf_counter() - started, 1),
    })
    print(f"{task.title} at step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()), flush=True)


def _files(path: Path) -> list[Path]:
    """A file, or those below a folder."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path] if path.is_file() else []
