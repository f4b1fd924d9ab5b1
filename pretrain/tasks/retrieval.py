"""retrieval: find the target view of each test row among those of all rows; scored by pretrain/evaluation/model_tasks/retrieval.py."""

from typing import Literal

from pretrain.tasks.directions import Directions, higher
from pretrain.tasks.options import PairTask

METRICS: Directions = higher("recall_at_1", "recall_at_10", "mrr")


class Config(PairTask):
    """Find the other view of a row by the embeddings."""

    name: Literal["retrieval"]
