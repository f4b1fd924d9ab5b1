"""nq_open: short answers to open questions; each question has one or more correct answers.

Metrics, as fractions of the test rows:

    exact      the answer ended with the end token and equals a correct answer
    contains   the answer contains the words of a correct answer consecutively
    stopped    the answer ended with the end token

Case, punctuation, articles and extra white space are ignored (Rajpurkar et al., "SQuAD", EMNLP 2016). An empty answer
is never correct.
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
    """Options of the task that writes a short answer, which is compared with all correct answers."""

    name: Literal["nq_open"]


def evaluate(run: TaskRun) -> TaskResult:
    """Answer the questions of the test rows and score the answers."""
    rows = run.read_test()
    answers = run.generate_answers(rows)
    return TaskResult(
        len(rows), score([correct_answers(row) for row in rows], answers), count_too_long_contexts(answers)
    )


def correct_answers(row: "Row") -> list[str]:
    """Return the correct answers of a row: those in its column `answer` if it is valid, else only the target."""
    try:
        return nq_open.correct_answers(row.columns["answer"])
    except (KeyError, ValueError):
        return [row.target]


def score(targets: Sequence[Sequence[str]], answers: Sequence[Answer]) -> dict[str, float]:
    """Return the metrics over all rows; `targets` contains the correct answers of each row."""
    rows = [
        ({normalize(target) for target in row_targets} - {""}, normalize(answer.text), answer.stopped)
        for row_targets, answer in zip(targets, answers, strict=True)
    ]
    return {
        "exact": rate(text in correct and stopped for correct, text, stopped in rows),
        "contains": rate(any(f" {target} " in f" {text} " for target in correct) for correct, text, _ in rows),
        "stopped": rate(stopped for *_, stopped in rows),
    }


def normalize(text: str) -> str:
    """Return a text in lower case without articles, punctuation and extra white space.

    If a text consists entirely of articles and punctuation, they are kept.
    """
    words = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()
    return " ".join(words or text.lower().split())
