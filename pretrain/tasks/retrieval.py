"""retrieval: find the target view of each test row among those of all rows; scored by pretrain/evaluation/model_tasks/retrieval.py."""

from typing import Literal

from pretrain.tasks.directions import MetricDirections, higher, split_direction
from pretrain.tasks.options import PairTask

METRICS: MetricDirections = higher("recall_at_1", "recall_at_10", "mrr")


class Config(PairTask):
    """Find the other view of a row by the embeddings."""

    name: Literal["retrieval"]

    def reports_metric(self, metric: str, views: tuple[str, ...]) -> bool:
        """Return whether a declared metric is among the results: a direction of prediction is one of two views."""
        prefix, _ = split_direction(metric)
        return not prefix or prefix in {
            f"{source}_to_{target}" for source in views for target in views if source != target
        }
