"""Classification tasks: choose one of a few labels for a text.

Metrics, as fractions of the test rows:

    likelihood   the target is the most likely label, with the end token included; a tie counts as wrong
    generation   the generated answer is the target and ended with the end token
    prefix       the generated answer starts with the target (the measure of the LLM-JEPA paper)
    stopped      the generated answer ended with the end token
    majority     the target is the most common target: the best score of a model that ignores the text

The candidates are the task's labels and all targets of the test and train files, also beyond the rows used: fewer
candidates would raise the chance level. If the files use none of the task's labels, their targets replace them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from data_prep.console import UserError
from pretrain.tasks.directions import MetricDirections, higher
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

METRICS: MetricDirections = higher("likelihood", "generation", "prefix", "stopped") | {"majority": "neither"}
MOST_LABELS = 50
"""Largest number of different targets that a classification task accepts."""


def labels_of(rows: "Iterable[Row]", known: Sequence[str]) -> list[str]:
    """Return the candidate labels, sorted: all targets, and the known labels if any target is one of them."""
    found = {row.target for row in rows}
    return sorted(found | set(known) if found & set(known) else found)


def evaluate_labels(run: TaskRun, known: Sequence[str]) -> TaskResult:
    """Compute the likelihood of each label and generate an answer for each test row, then score both.

    `known` are the labels of the public data set. Raises UserError for data with one label, or more than MOST_LABELS.
    """
    all_rows = run.read_test(every=True)
    rows = all_rows[: run.task.rows]
    targets = [row.target for row in rows]
    labels = labels_of([*all_rows, *run.read_train()], known)
    if len(labels) < 2:
        raise UserError(
            f"task.test: every row has the same target {labels[0]!r}; check the columns, "
            "or set task.train to rows with the other labels"
        )
    if len(labels) > MOST_LABELS:
        raise UserError(
            f"task.test has {len(labels)} different targets, but a classification task takes at most {MOST_LABELS}; "
            "check the columns"
        )
    answers = run.generate_answers(rows)
    likelihoods = run.log_likelihoods([(row.context, labels) for row in rows])
    counts = {"labels": len(labels)} | count_too_long_contexts(answers) | count_too_long_options(likelihoods)
    return TaskResult(len(rows), score(targets, labels, likelihoods, answers), counts)


def score(
    targets: Sequence[str], labels: Sequence[str], likelihoods: Sequence[Sequence[float]], answers: Sequence[Answer]
) -> dict[str, float]:
    """Return the metrics over all rows; `likelihoods` (rows, labels) are log-likelihoods in nats."""
    return {
        "likelihood": rate(
            is_strict_argmax(values, labels.index(target)) for target, values in zip(targets, likelihoods, strict=True)
        ),
        "generation": rate(
            answer.text == target and answer.stopped for target, answer in zip(targets, answers, strict=True)
        ),
        "prefix": rate(answer.text.startswith(target) for target, answer in zip(targets, answers, strict=True)),
        "stopped": rate(answer.stopped for answer in answers),
        "majority": max(Counter(targets).values()) / len(targets),
    }
