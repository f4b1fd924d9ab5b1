"""nq_open: short answers to open questions, each with several right ones.

Answers are compared without case, punctuation, articles and surplus white space (Rajpurkar et al., "SQuAD", EMNLP 2016). exact: the answer ended with
the end token and equals one of the right ones. contains: the words of a right one stand in it. stopped: it ended with the end token. An empty answer
is never right.
"""

import re
import string
from collections.abc import Sequence
from typing import Any

from pretrain.evaluation.generate import Answer
from pretrain.evaluation.rows import Row
from pretrain.evaluation.tasks.answering import model_of, read_test, without_room, write_answers
from pretrain.evaluation.tasks.rates import rate
from pretrain.evaluation.tasks.task_run import TaskResult, TaskRun

PUNCTUATION = str.maketrans("", "", string.punctuation)


def own_columns(columns: dict[str, Any]) -> tuple[str, str] | None:
    """As NQ-Open stands on the hub; the first of the right answers is trained on."""
    if not isinstance(right := columns.get("answer"), list):
        return None
    if not all(isinstance(text, str) for text in right):
        raise ValueError("an answer that is no text")
    return columns["question"], right[0]


def evaluate(run: TaskRun) -> TaskResult:
    """Finetune on the train rows where the task says so, answer the test rows, score."""
    rows = read_test(run, own_columns)
    with model_of(run, own_columns) as model:
        answers = write_answers(run, model, rows)
    return TaskResult(len(rows), score([right_answers(row) for row in rows], answers), without_room(answers))


def right_answers(row: Row) -> list[str]:
    """All that count, where the row stands as on the hub; else the target alone."""
    found = row.columns.get("answer")
    return found if isinstance(found, list) and all(isinstance(text, str) for text in found) else [row.target]


def score(targets: Sequence[Sequence[str]], answers: Sequence[Answer]) -> dict[str, float]:
    """Rates over all rows; `targets` are the right answers of each."""
    rows = [({normal(target) for target in right} - {""}, normal(answer.text), answer.stopped)
            for right, answer in zip(targets, answers, strict=True)]
    return {
        "exact": rate(text in right and stopped for right, text, stopped in rows),
        "contains": rate(any(f" {target} " in f" {text} " for target in right) for right, text, _ in rows),
        "stopped": rate(stopped for *_, stopped in rows),
    }


def normal(text: str) -> str:
    """Return the words of a text in lower case, without articles and punctuation; of one that has nothing else, what it has."""
    words = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()
    return " ".join(words or text.lower().split())
