"""geometry: relations between the embeddings of the two views.

pretrain/evaluation/model_tasks/geometry.py measures them.
"""

from typing import Literal

from pretrain.tasks.directions import MetricDirections
from pretrain.tasks.options import PairTask

METRICS: MetricDirections = {
    "paired_cosine": "neither",
    "shuffled_cosine": "lower",
    "effective_rank_context": "higher",
    "effective_rank_target": "higher",
    "linear_residual": "neither",
    "linear_residual_unseen": "lower",
    "difference_singular": "neither",
}


class Config(PairTask):
    """Options of the task that measures how the embeddings of two views relate."""

    name: Literal["geometry"]
