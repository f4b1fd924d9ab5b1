"""Which direction of a metric is better, so that the report can distinguish help from harm. Each task declares its own in `METRICS`."""

import importlib
import importlib.util
import re
from typing import Literal

MetricDirection = Literal["higher", "lower", "neither"]
"""neither: more of it is not better by itself, for instance because collapsed embeddings have it too."""
MetricDirections = dict[str, MetricDirection]

VALIDATION = "validation"
"""As a task: the metric is a tag of metrics.jsonl that begins with `validation/`."""
LOSSES: MetricDirections = dict.fromkeys(("lm", "jepa", "sigreg", "vicreg", "coding_rate"), "lower")
"""Terms of the loss."""
MONITORS: MetricDirections = {
    "paired_cosine": "neither",
    "shuffled_cosine": "lower",
    "effective_rank": "higher",
    "retrieval_at_1": "higher",
}
"""Embedding monitors, see pretrain/objectives/monitors.py."""
_VALIDATION: MetricDirections = {f"loss/{name}": direction for name, direction in LOSSES.items()} | {
    f"embedding/{name}": direction for name, direction in MONITORS.items()
}


def higher(*metrics: str) -> MetricDirections:
    """Declare metrics of which more is better."""
    return dict.fromkeys(metrics, "higher")


def metric_directions(task: str) -> MetricDirections:
    """Return the direction of each metric that a task, or `validation`, declares; none for a task that does not exist."""
    if task == VALIDATION:
        return _VALIDATION
    name = f"pretrain.tasks.{task}"
    if not task.isidentifier() or importlib.util.find_spec(name) is None:
        return {}
    metrics: MetricDirections = getattr(importlib.import_module(name), "METRICS", {})
    return metrics


def direction(task: str, metric: str) -> MetricDirection | None:
    """Return the direction that a task, or `validation`, declares for a metric; None if it declares none.

    The metrics of further directions of prediction have the prefix `A_to_B_`.
    """
    declared = metric_directions(task)
    name = split_direction(metric)[1] if task == "retrieval" else metric
    return declared.get(name)


def split_direction(metric: str) -> tuple[str, str]:
    """Return the direction of prediction that a metric of `retrieval` starts with, such as `code_to_text`, and the metric; "" without one."""
    found = re.fullmatch(r"(\w+_to_\w+?)_(recall_at_10?|mrr)", metric)
    return (found[1], found[2]) if found else ("", metric)
