"""Tasks of labels: choose one of a few words for a text.

likelihood: of all labels the target is the most likely answer, the end token included; a tie is no choice. generation: the written answer is
the target and ended with the end token. prefix: it starts with the target (what the LLM-JEPA paper reports). majority: the share of the most common
label, which a model reaches that looks at no text.

The labels are those of the task and all targets of the test and train files, whichever rows are used: with fewer options than the task has, chance
alone would score better. Where the files have none of the task's labels, their words stand for these.
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


def labels_of(rows: "Iterable[Row]", known: Sequence[str]) -> list[str]:
    """Return the labels to choose from: the targets of the rows, and the known labels unless the rows use other words altogether."""
    found = {row.target for row in rows}
    return sorted(found | set(known) if found & set(known) else found)


def evaluate_labels(run: TaskRun, known: Sequence[str]) -> TaskResult:
    """Weigh the labels for each test row, write an answer, score both.

    `known` are the labels of the public data set. Raises UserError for data with one label, or with too many.
    """
    every_row = run.read_test(every=True)
    rows = every_row[: run.task.rows]
    targets = [row.target for row in rows]
    labels = labels_of([*every_row, *run.read_train()], known)
    if len(labels) < 2:
        raise UserError(
            f"task.test: every row has the target {labels[0]!r}, which leaves nothing to choose; look at the columns, "
            "or give task.train with the other labels"
        )
    if len(labels) > MOST_LABELS:
        raise UserError(
            f"task.test has {len(labels)} different targets, but a task of labels takes at most {MOST_LABELS}; look at the columns"
        )
    answers = run.generate_answers(rows)
    likelihoods = run.log_likelihoods([(row.context, labels) for row in rows])
    counts = {"labels": len(labels)} | count_too_long_contexts(answers) | count_too_long_options(likelihoods)
    return TaskResult(len(rows), score(targets, labels, likelihoods, answers), counts)


def score(
    targets: Sequence[str], labels: Sequence[str], likelihoods: Sequence[Sequence[float]], answers: Sequence[Answer]
) -> dict[str, float]:
    """Rates over all rows; `likelihoods` (rows, labels) are log-likelihoods."""
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
