"""nq_open: short answers to open questions; each question has several right answers.

Metrics, as fractions of the test rows:

    exact      the answer ended with the end token and equals a right answer
    contains   the answer contains the words of a right answer, one after another
    stopped    the answer ended with the end token

Case, punctuation, articles and extra white space are ignored (Rajpurkar et al., "SQuAD", EMNLP 2016). An empty answer
is never right.
"""

import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from data_prep.tasks import nq_open
from pretrain.tasks.directions import MetricDirections, higher
from pretrain.tasks.options import AnswerTask
from pretrain.tasks.scoring import Answer, TaskResult, TaskRun, count_too_long_contexts, rate

if TYPE_CHECKING:
    from data_prep.task_rows import Row

METRICS: MetricDirections = higher("exact", "contains", "stopped")
PUNCTUATION = str.maketrans("", "", string.punctuation)


class Config(AnswerTask):
    """Options of the task: write a short answer, scored against all right answers."""

    name: Literal["nq_open"]


def evaluate(run: TaskRun) -> TaskResult:
    """Answer the test rows and score the answers."""
    rows = run.read_test()
    answers = run.generate_answers(rows)
    return TaskResult(len(rows), score([right_answers(row) for row in rows], answers), count_too_long_contexts(answers))


def right_answers(row: "Row") -> list[str]:
    """Return the right answers of a row: the column `answer` of the public data set, or else the target alone."""
    try:
        return nq_open.right_answers(row.columns["answer"])
    except (KeyError, ValueError):
        return [row.target]


def score(targets: Sequence[Sequence[str]], answers: Sequence[Answer]) -> dict[str, float]:
    """Return the metrics over all rows; `targets` holds the right answers of each row."""
    rows = [
        ({normal(target) for target in right} - {""}, normal(answer.text), answer.stopped)
        for right, answer in zip(targets, answers, strict=True)
    ]
    return {
        "exact": rate(text in right and stopped for right, text, stopped in rows),
        "contains": rate(any(f" {target} " in f" {text} " for target in right) for right, text, _ in rows),
        "stopped": rate(stopped for *_, stopped in rows),
    }


def normal(text: str) -> str:
    """Return a text in lower case without articles, punctuation and extra white space.

    A text that consists of articles and punctuation only keeps them.
    """
    words = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()
    return " ".join(words or text.lower().split())
