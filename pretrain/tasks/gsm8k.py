"""gsm8k: write the solution of a problem, scored by its final answer: the number behind the last `####`.

final: the answer ended with the end token, and its final number equals the target's. final_any: the same whether or not it ended. answered: it has
a final number. A row whose target has none counts as wrong (failed_gold).
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
    """Write the solution of a problem, scored by its final answer."""

    name: Literal["gsm8k"]


def evaluate(run: TaskRun) -> TaskResult:
    """Answer the test rows and score the answers."""
    rows = run.read_test()
    answers = run.generate_answers(rows)
    metrics, counts = score([row.target for row in rows], answers)
    return TaskResult(len(rows), metrics, counts | count_too_long_contexts(answers))


def score(targets: Sequence[str], answers: Sequence[Answer]) -> tuple[dict[str, float], dict[str, int]]:
    """Rates over all rows, and how many targets have no final number."""
    wanted, given = [final_number(target) for target in targets], [final_number(answer.text) for answer in answers]
    right = [gold is not None and gold == number for gold, number in zip(wanted, given, strict=True)]
    return {
        "final": rate(hit and answer.stopped for hit, answer in zip(right, answers, strict=True)),
        "final_any": rate(right),
        "answered": rate(number is not None for number in given),
        "stopped": rate(answer.stopped for answer in answers),
    }, {"failed_gold": wanted.count(None)}


def final_number(text: str) -> Decimal | None:
    """Return the number after the last `####`, or None if there is none.

    18, +18.0, $1,800, **18** and -0.5 are numbers; 1/2 and 18-20 are not.
    """
    _, mark, rest = text.rpartition("####")
    found = FINAL.match(rest) if mark else None
    return Decimal(found[1].replace("−", "-") + found[2].replace(",", "")) if found else None
