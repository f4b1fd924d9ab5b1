"""Classification tasks: choose one of a few labels for a text.

Metrics, as fractions of the test rows:

    likelihood   the target is the most likely label (its end token counts); a tie counts as wrong
    generation   the generated answer equals the target and ends with the end token
    prefix       the generated answer starts with the target (the measure of the LLM-JEPA paper)
    stopped      the generated answer ends with the end token
    majority     the target is the most common target: the best score of a model that ignores the text

The candidates are the task's labels and all targets in the test and train files, including rows that are not scored,
because fewer candidates would raise the chance level. If no target in the files is one of the task's labels, only the
targets are candidates.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from data_prep.utils.console import UserError
from pretrain.tasks.directions import MetricDirections, higher
from pretrain.tasks.rows import RowRate, exact, mean_rates, prefix, stopped
from pretrain.tasks.scoring import (
    Answer,
    TaskResult,
    TaskRun,
    count_too_long_contexts,
    count_too_long_options,
    is_strict_argmax,
    rate,
)

if TYPE_CHECKING:
    from data_prep.task_rows import Row

logger = logging.getLogger(__name__)

METRICS: MetricDirections = higher("likelihood", "generation", "prefix", "stopped") | {"majority": "neither"}
ROW_RATES: dict[str, RowRate] = {"generation": exact, "prefix": prefix, "stopped": stopped}
MOST_LABELS = 50
"""Maximum number of candidate labels of a classification task."""


def labels_of(rows: "Iterable[Row]", known_labels: Sequence[str]) -> list[str]:
    """Return the candidate labels, sorted: all targets, and the known labels if any target is one of them."""
    labels = {row.target for row in rows}
    if labels & set(known_labels):
        labels |= set(known_labels)
    return sorted(labels)


def evaluate_labels(run: TaskRun, known_labels: Sequence[str]) -> TaskResult:
    """Compute the likelihood of each label and generate an answer for each test row, then score both.

    `known_labels` lists the labels of the public data set. Raises UserError for fewer than 2 or more than MOST_LABELS
    labels.
    """
    all_rows = run.read_test(every=True)
    rows = all_rows[: run.task.rows]
    targets = [row.target for row in rows]
    labels = labels_of([*all_rows, *run.read_train()], known_labels)
    if len(labels) < 2:
        raise UserError(
            f"task.test: every row has the same target {labels[0]!r}; check which column is the target, "
            "or set task.train to rows with the other labels"
        )
    if len(labels) > MOST_LABELS:
        raise UserError(
            f"task.test and task.train: there are {len(labels)} candidate labels, but a classification task takes at "
            f"most {MOST_LABELS}; check which column is the target"
        )
    if unscored := {row.target for row in all_rows} - set(targets):
        logger.warning(
            f"the first {len(rows):,} test rows, which are scored, lack {len(unscored)} of the labels of the file, as "
            "if it were sorted by label: remove `rows` of the task, or shuffle the file"
        )
    answers = run.generate_answers(rows)
    log_likelihoods = run.log_likelihoods([(row.context, labels) for row in rows])
    counts = {"labels": len(labels)} | count_too_long_contexts(answers) | count_too_long_options(log_likelihoods)
    return TaskResult(len(rows), score(targets, labels, log_likelihoods, answers), counts)


def score(
    targets: Sequence[str], labels: Sequence[str], log_likelihoods: Sequence[Sequence[float]], answers: Sequence[Answer]
) -> dict[str, float]:
    """Return the metrics over all rows; `log_likelihoods` (rows, labels) are in nats."""
    return {
        "likelihood": rate(
            is_strict_argmax(values, labels.index(target))
            for target, values in zip(targets, log_likelihoods, strict=True)
        ),
        **mean_rates(ROW_RATES, targets, answers),
        "majority": max(Counter(targets).values()) / len(targets),
    }
