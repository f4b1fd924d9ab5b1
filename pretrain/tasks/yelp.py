"""yelp: predict the number of stars of a review; see pretrain/tasks/labels.py."""

from typing import ClassVar, Literal

from data_prep.tasks.yelp import LABELS
from pretrain.tasks.labels import METRICS, ROW_RATES, evaluate_labels
from pretrain.tasks.options import AnswerTask
from pretrain.tasks.scoring import TaskResult, TaskRun

__all__ = ["METRICS", "ROW_RATES", "Config", "evaluate"]


class Config(AnswerTask):
    """Options of the task that predicts the number of stars of a review."""

    name: Literal["yelp"]

    SCORING_READS_TRAIN: ClassVar[bool] = True


def evaluate(run: TaskRun) -> TaskResult:
    """Score the labels by likelihood and by generation."""
    return evaluate_labels(run, LABELS)
