"""hellaswag: choose one of four endings of a text by likelihood.

Metrics, as fractions of the test rows:

    normalised   the right ending has the highest log-likelihood per character
    likelihood   the right ending has the highest log-likelihood

Log-likelihoods include the end token. A tie for the highest value counts as wrong. Chance level is 1/4.
"""

from collections.abc import Sequence
from typing import Literal

from data_prep.console import UserError
from data_prep.tasks.hellaswag import choices
from pretrain.tasks.directions import MetricDirections, higher
from pretrain.tasks.options import AnswerTask
from pretrain.tasks.scoring import TaskResult, TaskRun, count_too_long_options, is_strict_argmax, rate

METRICS: MetricDirections = higher("normalised", "likelihood")


class Config(AnswerTask):
    """Options of the task: choose the ending of a text by likelihood."""

    name: Literal["hellaswag"]


def evaluate(run: TaskRun) -> TaskResult:
    """Compute the likelihoods of the endings of the test rows and score the choices.

    Raises UserError for rows without the expected columns, or with fewer than two endings.
    """
    rows = run.read_test()
    try:
        found = [choices(row.columns) for row in rows]
    except (KeyError, ValueError) as error:
        raise UserError(f"task.test: the task hellaswag needs the columns ctx, endings and label: {error}") from None
    if any(len(texts) < 2 for texts, _ in found):
        raise UserError("task.test: a row has fewer than two endings to choose from; give each row at least two")
    endings, labels = [texts for texts, _ in found], [label for _, label in found]
    likelihoods = run.log_likelihoods([(row.context, texts) for row, texts in zip(rows, endings, strict=True)])
    return TaskResult(len(rows), score(labels, endings, likelihoods), count_too_long_options(likelihoods))


def score(
    labels: Sequence[int], endings: Sequence[Sequence[str]], likelihoods: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Return the metrics over all rows; `likelihoods` (rows, endings) are log-likelihoods in nats."""
    per_character = [
        [value / max(1, len(text)) for value, text in zip(values, texts, strict=True)]
        for values, texts in zip(likelihoods, endings, strict=True)
    ]
    return {
        "normalised": rate(
            is_strict_argmax(values, label) for values, label in zip(per_character, labels, strict=True)
        ),
        "likelihood": rate(is_strict_argmax(values, label) for values, label in zip(likelihoods, labels, strict=True)),
    }
