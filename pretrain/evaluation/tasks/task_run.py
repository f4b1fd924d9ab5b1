"""What a task is given and what it returns."""

from dataclasses import dataclass
from pathlib import Path

from pretrain.config import RunConfig, TaskConfig


@dataclass(frozen=True)
class TaskRun:
    """One task on one checkpoint."""

    config: RunConfig
    """Of the pretraining run."""
    task: TaskConfig
    step: int
    export: Path
    """The checkpoint in Hugging Face format."""
    folder: Path
    """Where the task may write: the run's evaluation folder."""


@dataclass(frozen=True)
class TaskResult:
    """The outcome."""

    rows: int
    """Test rows."""
    metrics: dict[str, float]
