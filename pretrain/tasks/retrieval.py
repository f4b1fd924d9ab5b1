"""retrieval: find the target view of each test row among the target views of all rows.

pretrain/evaluation/model_tasks/retrieval.py scores it.
"""

from typing import TYPE_CHECKING, Literal

from pretrain.tasks.directions import MetricDirections, higher, split_direction
from pretrain.tasks.options import PairTask

if TYPE_CHECKING:
    from pretrain.objectives.configs import ObjectiveConfig

METRICS: MetricDirections = higher("recall_at_1", "recall_at_10", "mrr")


class Config(PairTask):
    """Options of the task that finds the target view of each row among all target views, by their embeddings."""

    name: Literal["retrieval"]
    target: Literal["alone", "in_context"] = "alone"
    """Encoding of the targets: alone, or after their own first view, as with `objective.target`. Only for two views."""

    def check_views(self, views: tuple[str, ...]) -> None:
        """Raise ValueError unless there are at least two views, or two if the targets are in context."""
        super().check_views(views)
        if self.target == "in_context" and len(views) > 2:
            raise ValueError(f"target: in_context needs two views, but data.views is {list(views)}; use target: alone")

    def check_objective(self, objective: "ObjectiveConfig") -> None:
        """Raise ValueError if targets are in context and the objective trains a model that reads none in context."""
        forward = objective.pairing is None or objective.pairing.direction == "forward"
        if self.target == "in_context" and not (objective.layout == "joint" and forward):
            raise ValueError(
                "target: in_context needs an objective with layout: joint and direction: forward, in which the target "
                "has a context; use target: alone"
            )

    def reports_metric(self, metric: str, views: tuple[str, ...]) -> bool:
        """Return whether the task reports a metric; its direction of prediction, if any, must join two of the views."""
        prefix, _ = split_direction(metric)
        possible = {f"{source}_to_{target}" for source in views for target in views if source != target}
        return not prefix or prefix in possible
