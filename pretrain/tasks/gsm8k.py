"""gsm8k: write the solution of a problem, scored by its final number: the number after the last `####`.

Metrics, as fractions of the test rows:

    final       the answer ended with the end token, and its final number equals the target's
    final_any   its final number equals the target's, whether or not the answer ended with the end token
    answered    the answer has a final number
    stopped     the answer ended with the end token

A row is wrong if its target has no final number; the count `failed_gold` is the number of these rows.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

from pretrain.tasks.directions import MetricDirections, higher
from pretrain.tasks.options import AnswerTask
from pretrain.tasks.scoring import Answer, TaskResult, TaskRun, count_too_long_contexts, rate

METRICS: MetricDirections = higher("final", "final_any", "answered", "stopped")
FINAL = re.compile(
    r"\s*\**\s*\$?\s*([-−+]?)\s*\$?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
    r"(?![\d_]|[.,eExX]\d|[^\S\n]*[-−+*/^]?[^\S\n]*\d|/)"
)


class Config(AnswerTask):
    """Options of the task that writes the solution of a problem and is scored by its final number."""

    name: Literal["gsm8k"]


def evaluate(run: TaskRun) -> TaskResult:
    """Generate answers to the test rows and score the answers."""
    rows = run.read_test()
    answers = run.generate_answers(rows)
    metrics, counts = score([row.target for row in rows], answers)
    return TaskResult(len(rows), metrics, counts | count_too_long_contexts(answers))


def score(targets: Sequence[str], answers: Sequence[Answer]) -> tuple[dict[str, float], dict[str, int]]:
    """Return the metrics over all rows, and as `failed_gold` the number of targets without a final number."""
    gold_numbers = [final_number(target) for target in targets]
    answer_numbers = [final_number(answer.text) for answer in answers]
    is_right = [gold is not None and gold == number for gold, number in zip(gold_numbers, answer_numbers, strict=True)]
    return {
        "final": rate(right and answer.stopped for right, answer in zip(is_right, answers, strict=True)),
        "final_any": rate(is_right),
        "answered": rate(number is not None for number in answer_numbers),
        "stopped": rate(answer.stopped for answer in answers),
    }, {"failed_gold": gold_numbers.count(None)}


def final_number(text: str) -> Decimal | None:
    """Return the number after the last `####`, or None if there is none.

    18, +18.0, $1,800, **18** and -0.5 are numbers; 1/2 and 18-20 are not.
    """
    _, mark, tail = text.rpartition("####")
    match = FINAL.match(tail) if mark else None
    return Decimal(match[1].replace("−", "-") + match[2].replace(",", "")) if match else None
