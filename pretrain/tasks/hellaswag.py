"""hellaswag: choose one of four endings of a text by likelihood.

Metrics, as fractions of the test rows:

    normalised   the correct ending has the highest log-likelihood per character
    likelihood   the correct ending has the highest log-likelihood

Log-likelihoods include the end token. A tie for the highest value counts as wrong. Chance level is 1/4.
"""

from collections.abc import Sequence
from typing import Literal

from data_prep.tasks.hellaswag import choices
from data_prep.utils.console import UserError
from pretrain.tasks.directions import MetricDirections, higher
from pretrain.tasks.options import AnswerTask
from pretrain.tasks.scoring import TaskResult, TaskRun, count_too_long_options, is_strict_argmax, rate

METRICS: MetricDirections = higher("normalised", "likelihood")


class Config(AnswerTask):
    """Options of the task that chooses the ending of a text by likelihood."""

    name: Literal["hellaswag"]


def evaluate(run: TaskRun) -> TaskResult:
    """Score each test row by the log-likelihoods of its endings.

    Raises UserError for rows without the expected columns, or with fewer than two endings.
    """
    rows = run.read_test()
    try:
        row_choices = [choices(row.columns) for row in rows]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"task.test: every row of hellaswag needs valid columns ctx, endings and label; correct the rows ({error})"
        ) from None
    endings, labels = [texts for texts, _ in row_choices], [label for _, label in row_choices]
    for number, texts in enumerate(endings, start=1):
        if len(texts) < 2:
            raise UserError(f"task.test: row {number} has fewer than two endings; give each row at least two")
    log_likelihoods = run.log_likelihoods([(row.context, texts) for row, texts in zip(rows, endings, strict=True)])
    return TaskResult(len(rows), score(labels, endings, log_likelihoods), count_too_long_options(log_likelihoods))


def score(
    labels: Sequence[int], endings: Sequence[Sequence[str]], log_likelihoods: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Return the metrics over all rows; `log_likelihoods` (rows, endings) are in nats."""
    per_character = [
        [value / max(1, len(text)) for value, text in zip(values, texts, strict=True)]
        for values, texts in zip(log_likelihoods, endings, strict=True)
    ]
    return {
        "normalised": rate(
            is_strict_argmax(values, label) for values, label in zip(per_character, labels, strict=True)
        ),
        "likelihood": rate(
            is_strict_argmax(values, label) for values, label in zip(log_likelihoods, labels, strict=True)
        ),
    }
