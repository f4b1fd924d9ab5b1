"""loss: the losses of the objective, and the embedding monitors.

pretrain/evaluation/model_tasks/loss.py measures them.
"""

from typing import Literal

from pretrain.tasks.directions import LOSSES, MONITORS, MetricDirections
from pretrain.tasks.options import RowTask

METRICS: MetricDirections = LOSSES | MONITORS


class Config(RowTask):
    """Options of the task that computes the losses in the same way as validation."""

    name: Literal["loss"]
