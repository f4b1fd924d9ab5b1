"""yelp: the stars of a review, see pretrain/evaluation/tasks/labels.py."""

from typing import Any

from pretrain.evaluation.tasks.labels import evaluate_labels, in_range
from pretrain.evaluation.tasks.task_run import TaskResult, TaskRun

STARS = 5


def own_columns(columns: dict[str, Any]) -> tuple[str, str] | None:
    """As Yelp reviews stand on the hub, where the labels 0 to 4 mean 1 to 5 stars."""
    return (columns["text"], str(in_range(columns["label"], STARS) + 1)) if {"text", "label"} <= columns.keys() else None


def evaluate(run: TaskRun) -> TaskResult:
    """Label accuracy by likelihood and by generation."""
    return evaluate_labels(run, own_columns, [str(stars + 1) for stars in range(STARS)])
