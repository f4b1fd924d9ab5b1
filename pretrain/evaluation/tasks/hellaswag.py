"""hellaswag: choose the ending of a text among four by likelihood.

normalised: the right ending has the highest log-likelihood, the end token included, divided by its characters. likelihood: the highest one undivided.
A tie is no choice. One of four is chance.
"""

from collections.abc import Sequence
from typing import Any

from data_prep.console import UserError
from pretrain.evaluation.likelihood import log_likelihoods
from pretrain.evaluation.tasks.answering import beyond_positions, model_of, read_test
from pretrain.evaluation.tasks.labels import in_range
from pretrain.evaluation.tasks.rates import rate, sole_best
from pretrain.evaluation.tasks.task_run import TaskResult, TaskRun


def own_columns(columns: dict[str, Any]) -> tuple[str, str] | None:
    """As HellaSwag stands on the hub; its test split has no labels, so that its validation split is scored."""
    if not {"ctx", "endings", "label"} <= columns.keys():
        return None
    endings, label = choices(columns)
    return columns["ctx"], endings[label]


def choices(columns: dict[str, Any]) -> tuple[list[str], int]:
    """Return the endings of a row, and which is the right one. Raises KeyError, and ValueError for what is neither."""
    endings = columns["endings"]
    if not isinstance(endings, list) or not all(isinstance(text, str) and text for text in endings):
        raise ValueError("endings that are no list of texts")
    return endings, in_range(columns["label"], len(endings))


def evaluate(run: TaskRun) -> TaskResult:
    """Finetune on the right endings of the train rows where the task says so, weigh the endings of the test rows, score."""
    rows = read_test(run, own_columns)
    try:
        found = [choices(row.columns) for row in rows]
    except (KeyError, ValueError) as error:
        raise UserError(f"{run.test_path} (task.test): the task hellaswag needs the columns ctx, endings and label: {error}") from None
    if any(len(texts) < 2 for texts, _ in found):
        raise UserError(f"{run.test_path} (task.test): a row has a single ending, which leaves nothing to choose; give each at least two")
    endings, labels = [texts for texts, _ in found], [label for _, label in found]
    with model_of(run, own_columns) as model:
        likelihoods = log_likelihoods(model, [(row.context, texts) for row, texts in zip(rows, endings, strict=True)])
    return TaskResult(len(rows), score(labels, endings, likelihoods), beyond_positions(likelihoods))


def score(labels: Sequence[int], endings: Sequence[Sequence[str]], likelihoods: Sequence[Sequence[float]]) -> dict[str, float]:
    """Rates over all rows; `likelihoods` (rows, endings) are log-likelihoods."""
    per_character = [[value / max(1, len(text)) for value, text in zip(values, texts, strict=True)]
                     for values, texts in zip(likelihoods, endings, strict=True)]
    return {
        "normalised": rate(sole_best(values, label) for values, label in zip(per_character, labels, strict=True)),
        "likelihood": rate(sole_best(values, label) for values, label in zip(likelihoods, labels, strict=True)),
    }
