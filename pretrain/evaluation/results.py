"""The results of a run's evaluations, in evaluation/results.jsonl."""

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.utils.console import UserError
from data_prep.utils.files import read_json_lines, sha256_file, write_text
from pretrain.run_folder import read_rewinds
from pretrain.tasks.options import TaskConfig

SCORING_VERSION = 2
"""Version of the scoring. It is raised whenever the same answers may get different scores.

Scores of different versions are never compared or averaged. Results without a version have version 1.
"""


def read_results(run_dir: Path) -> list[dict[str, Any]]:
    """Return the results of a run in the order in which they were added.

    Results of steps that a later rewind has undone are skipped. Raises UserError for a corrupt file.
    """
    rewinds = read_rewinds(run_dir)

    def is_undone(result: dict[str, Any]) -> bool:
        later_rewinds = rewinds[result.get("rewinds", len(rewinds)) :]
        return any(result["step"] > rewind["to"] for rewind in later_rewinds)

    return [result for result in _read_all(run_dir) if not is_undone(result)]


def _read_all(run_dir: Path) -> list[dict[str, Any]]:
    """Return all lines of results.jsonl.

    Raises UserError for a corrupt file. Only a manual change can corrupt it, because the file is written atomically.
    """
    path = run_dir / "evaluation" / "results.jsonl"
    try:
        return read_json_lines(path) if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path} is corrupt ({error}); fix the line, or move the file away to evaluate again") from None


def scoring_version(result: dict[str, Any]) -> int:
    """Return the scoring version of a result."""
    version: int = result.get("scoring", 1)
    return version


def result_key(task: TaskConfig, step: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the key that identifies a result.

    It contains the step, the task, the scoring version and the settings. The settings include the checksums of the
    task's files and the overrides, such as a seed.
    """
    paths = [source if isinstance(source, str) else source.path for source in (*task.sources.values(), *task.paths)]
    settings = task.model_dump(mode="json", exclude_none=True, exclude={"name", "label", "validation"}) | {
        "files": {str(file): sha256_file(file) for path in paths if path is not None for file in _files(Path(path))},
        "overrides": sorted(word for word in overrides if not word.startswith("task.")),
    }
    return {"step": step, "task": task.title, "scoring": SCORING_VERSION, "settings": settings}


def _files(path: Path) -> list[Path]:
    """Return the file at `path`, all files in the folder at `path`, or all files that match it as a glob."""
    if path.is_dir():
        matches = list(path.rglob("*"))
    elif path.exists():
        matches = [path]
    else:
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    return sorted(file for file in matches if file.is_file())


def is_evaluated(run_dir: Path, task: TaskConfig, step: int, overrides: Sequence[str] = ()) -> bool:
    """Return whether results.jsonl contains the result of the task at the step."""
    return step in evaluated_steps(run_dir, [task], overrides)


def evaluated_steps(run_dir: Path, tasks: Sequence[TaskConfig], overrides: Sequence[str] = ()) -> set[int]:
    """Return the steps for which results.jsonl contains the results of all tasks."""
    results = read_results(run_dir)
    keys = [{key: value for key, value in result_key(task, 0, overrides).items() if key != "step"} for task in tasks]
    return set.intersection(*({result["step"] for result in results if key.items() <= result.items()} for key in keys))


def append_result(run_dir: Path, result: dict[str, Any], tensorboard: bool = True) -> None:
    """Add a result to results.jsonl and, with `tensorboard`, a point for each metric at evaluation/<task>/<metric>."""
    lines = [*_read_all(run_dir), result]
    write_text(
        run_dir / "evaluation" / "results.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )
    if not tensorboard:
        return
    from pretrain.training.loggers.tensorboard import open_tensorboard

    writer = open_tensorboard(run_dir / "tensorboard" / "evaluation")
    for metric, value in result["metrics"].items():
        writer.add_scalar(f"evaluation/{result['task']}/{metric}", value, result["step"])
    writer.close()
