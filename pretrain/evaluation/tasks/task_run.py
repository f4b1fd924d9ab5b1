"""What a task is given and what it returns."""

from dataclasses import dataclass, field
from pathlib import Path

from data_prep.config import HubSource, JsonSource, task_source
from pretrain.config import RunConfig, TaskConfig
from pretrain.evaluation.directions import Directions
from pretrain.run_folder import step_name


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

    @property
    def name(self) -> str:
        """Of what the task writes."""
        return f"{self.task.title}-{step_name(self.step)}"

    @property
    def train(self) -> JsonSource | HubSource | None:
        """The rows to finetune on, where the task gives any."""
        return None if self.task.train is None else task_source(self.config.data, self.task.train)

    @property
    def test(self) -> JsonSource | HubSource | None:
        """The rows to score, where the task gives any."""
        return None if self.task.test is None else task_source(self.config.data, self.task.test)

    @property
    def test_path(self) -> str | None:
        """The file or data set of the rows to score, for messages."""
        return None if self.test is None else self.test.path


@dataclass(frozen=True)
class TaskResult:
    """The outcome."""

    rows: int
    """Test rows."""
    metrics: dict[str, float]
    """The most telling ones first, which the closing table shows."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows behind rates that are not over all rows, and rows that could not be scored as meant, which count as wrong."""
    directions: Directions = field(default_factory=dict)
    """Directions of metrics that the task does not declare in pretrain/evaluation/directions.py."""
