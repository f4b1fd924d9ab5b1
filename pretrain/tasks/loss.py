"""loss: the losses of the objective, and the embedding monitors.

pretrain/evaluation/model_tasks/loss.py measures them.
"""

from typing import Literal

from pretrain.tasks.directions import MONITORS, MetricDirections
from pretrain.tasks.options import RowTask

METRICS: MetricDirections = MONITORS
"""Directions of the monitors. All other metrics are terms of the objective; `direction` handles them."""


class Config(RowTask):
    """Options of the task that computes the losses in the same way as validation."""

    name: Literal["loss"]
