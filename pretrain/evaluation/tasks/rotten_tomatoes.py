"""rotten_tomatoes: whether a sentence of a review is good or bad, see pretrain/evaluation/tasks/labels.py."""

from typing import Any

from pretrain.evaluation.tasks.labels import evaluate_labels, in_range
from pretrain.evaluation.tasks.task_run import TaskResult, TaskRun

LABELS = ("Bad", "Good")
"""The words of the public LLM-JEPA data for the numbers of the hub."""


def own_columns(columns: dict[str, Any]) -> tuple[str, str] | None:
    """As Rotten Tomatoes stands on the hub."""
    return (columns["text"], LABELS[in_range(columns["label"], len(LABELS))]) if {"text", "label"} <= columns.keys() else None


def evaluate(run: TaskRun) -> TaskResult:
    """Label accuracy by likelihood and by generation."""
    return evaluate_labels(run, own_columns, LABELS)
