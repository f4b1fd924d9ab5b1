"""loss: the losses of the objective, and the embedding monitors.

pretrain/evaluation/model_tasks/loss.py measures them.
"""

from typing import Literal

from pretrain.tasks.directions import MONITORS, MetricDirections
from pretrain.tasks.options import RowTask

METRICS: MetricDirections = MONITORS | {f"in_context_{name}": direction for name, direction in MONITORS.items()}
"""Directions of the monitors; `in_context_` marks targets in context. The other metrics are terms of the objective."""


class Config(RowTask):
    """Options of the task that computes the losses in the same way as validation."""

    name: Literal["loss"]
