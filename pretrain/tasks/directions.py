"""Directions of metrics: whether higher or lower is better. The report needs them to distinguish help from harm.

Each task declares the directions of its own metrics in `METRICS`.
"""

import importlib
import importlib.util
import re
from typing import Literal

MetricDirection = Literal["higher", "lower", "neither"]
"""Better direction of a metric. neither: a higher value alone is not better; collapsed embeddings may have it too."""
MetricDirections = dict[str, MetricDirection]

VALIDATION = "validation"
"""Task name that stands for validation: its metrics are the tags of metrics.jsonl that begin with `validation/`."""
LOSS_TASK = "loss"
"""Task whose metrics are the terms of the objective and the embedding monitors."""
MONITORS: MetricDirections = {
    "paired_cosine": "neither",
    "shuffled_cosine": "lower",
    "effective_rank": "higher",
    "retrieval_at_1": "higher",
}
"""Embedding monitors; see pretrain/objectives/monitors.py."""
_VALIDATION: MetricDirections = {
    f"{group}/{name}": direction
    for group in ("embedding", "embedding_in_context")
    for name, direction in MONITORS.items()
}


def higher(*metrics: str) -> MetricDirections:
    """Declare metrics for which higher is better."""
    return dict.fromkeys(metrics, "higher")


def metric_directions(task: str) -> MetricDirections:
    """Return the declared direction of each metric of a task or of `validation`; empty for an unknown task.

    The terms of the loss are not declared, because they depend on the objective; see `direction`.
    """
    if task == VALIDATION:
        return _VALIDATION
    name = f"pretrain.tasks.{task}"
    if not task.isidentifier() or importlib.util.find_spec(name) is None:
        return {}
    metrics: MetricDirections = getattr(importlib.import_module(name), "METRICS", {})
    return metrics


def direction(task: str, metric: str) -> MetricDirection | None:
    """Return the direction that a task or `validation` declares for a metric, or None if it declares none.

    For a term of the loss, lower is better: these are the tags `loss/TERM` of `validation`, and all metrics of the task
    `loss` except the monitors. A prefix `A_to_B_` of a retrieval metric, such as `code_to_text_`, names a direction of
    prediction and is ignored.
    """
    declared = metric_directions(task)
    is_term = metric.startswith("loss/") if task == VALIDATION else task == LOSS_TASK and metric not in declared
    if is_term:
        return "lower"
    name = split_direction(metric)[1] if task == "retrieval" else metric
    return declared.get(name)


def split_direction(metric: str) -> tuple[str, str]:
    """Split a metric of `retrieval` into its direction of prediction, such as `code_to_text` or "", and its name."""
    match = re.fullmatch(r"(\w+_to_\w+?)_(recall_at_10?|mrr)", metric)
    return (match[1], match[2]) if match else ("", metric)
