"""loss: the losses of the objective, and the embedding monitors; measured by pretrain/evaluation/model_tasks/loss.py."""

from typing import Literal

from pretrain.tasks.directions import LOSSES, MONITORS, MetricDirections
from pretrain.tasks.options import RowTask

METRICS: MetricDirections = LOSSES | MONITORS


class Config(RowTask):
    """Compute the losses as validation does."""

    name: Literal["loss"]
