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
from pretrain.tasks.rows import RowRate, mean_rates, stopped
from pretrain.tasks.scoring import Answer, TaskResult, TaskRun, count_too_long_contexts

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
    failed_gold = sum(final_number(target) is None for target in targets)
    return mean_rates(ROW_RATES, targets, answers), {"failed_gold": failed_gold}


def final_number(text: str) -> Decimal | None:
    """Return the number after the last `####`, or None if there is none.

    18, +18.0, $1,800, **18** and -0.5 are numbers; 1/2 and 18-20 are not.
    """
    _, mark, tail = text.rpartition("####")
    match = FINAL.match(tail) if mark else None
    return Decimal(match[1].replace("−", "-") + match[2].replace(",", "")) if match else None


def _same_final_number(target: str, answer: Answer) -> bool:
    gold = final_number(target)
    return gold is not None and gold == final_number(answer.text)


ROW_RATES: dict[str, RowRate] = {
    "final": lambda target, answer: answer.stopped and _same_final_number(target, answer),
    "final_any": _same_final_number,
    "answered": lambda target, answer: final_number(answer.text) is not None,
    "stopped": stopped,
}
