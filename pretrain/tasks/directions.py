"""Which direction of a metric is better, so that the report can distinguish help from harm. Each task declares its own in `METRICS`."""

import importlib
import importlib.util
import re
from typing import Literal

Direction = Literal["higher", "lower", "neither"]
"""neither: more of it is not better by itself, for instance because collapsed embeddings have it too."""
Directions = dict[str, Direction]

VALIDATION = "validation"
"""As a task: the metric is a tag of metrics.jsonl that begins with `validation/`."""
LOSSES: Directions = dict.fromkeys(("lm", "jepa", "sigreg", "vicreg", "coding_rate"), "lower")
"""Terms of the loss."""
MONITORS: Directions = {"paired_cosine": "neither", "shuffled_cosine": "lower", "effective_rank": "higher", "retrieval_at_1": "higher"}
"""Embedding monitors, see pretrain/objectives/monitors.py."""
_VALIDATION: Directions = {f"loss/{name}": direction for name, direction in LOSSES.items()} | {
    f"embedding/{name}": direction for name, direction in MONITORS.items()}


def higher(*metrics: str) -> Directions:
    """Declare metrics of which more is better."""
    return dict.fromkeys(metrics, "higher")


def directions_of(task: str) -> Directions:
    """Return the direction of each metric that a task, or `validation`, declares; none for a task that does not exist."""
    if task == VALIDATION:
        return _VALIDATION
    name = f"pretrain.tasks.{task}"
    if not task.isidentifier() or importlib.util.find_spec(name) is None:
        return {}
    metrics: Directions = getattr(importlib.import_module(name), "METRICS", {})
    return metrics


def direction(task: str, metric: str) -> Direction | None:
    """Return the direction that a task, or `validation`, declares for a metric; None if it declares none.

    The metrics of further directions of prediction have the prefix `A_to_B_`.
    """
    declared = directions_of(task)
    name = split_direction(metric)[1] if task == "retrieval" else metric
    return declared.get(name)


def split_direction(metric: str) -> tuple[str, str]:
    """Return the direction of prediction that a metric of `retrieval` starts with, such as `code_to_text`, and the metric; "" without one."""
    found = re.fullmatch(r"(\w+_to_\w+?)_(recall_at_10?|mrr)", metric)
    return (found[1], found[2]) if found else ("", metric)
