"""rotten_tomatoes: classify a sentence of a film review as good or bad; see pretrain/tasks/labels.py."""

from typing import ClassVar, Literal

from data_prep.tasks.rotten_tomatoes import LABELS
from pretrain.tasks.labels import METRICS, ROW_RATES, evaluate_labels
from pretrain.tasks.options import AnswerTask
from pretrain.tasks.scoring import TaskResult, TaskRun

__all__ = ["METRICS", "ROW_RATES", "Config", "evaluate"]


class Config(AnswerTask):
    """Options of the task that classifies a sentence of a review as good or bad."""

    name: Literal["rotten_tomatoes"]

    SCORING_READS_TRAIN: ClassVar[bool] = True


def evaluate(run: TaskRun) -> TaskResult:
    """Score the labels by likelihood and by generation."""
    return evaluate_labels(run, LABELS)
