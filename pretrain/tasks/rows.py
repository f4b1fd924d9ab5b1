"""Properties of single test rows: whether a saved answer is right, and the kinds of rows to which a row belongs.

A task whose metrics follow from its saved answers declares `ROW_RATES` in its module, the most important rate first. It
may also define `row_kinds`, a function from the target and the context of a row to its `RowKinds`. The report then
shows the kinds of rows on which arms differ, at most 15 of them.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pretrain.tasks.scoring import Answer, rate

RowRate = Callable[[str, Answer], bool]
"""Function from a target and its answer to whether the row counts as right."""
RowKinds = dict[str, int | tuple[str, ...]]
"""Properties of a row by name. The rows are grouped by a number in quartiles, and by each of the texts of a tuple."""


def stopped(target: str, answer: Answer) -> bool:
    """Return whether the answer ended with the end token."""
    return answer.stopped


def exact(target: str, answer: Answer) -> bool:
    """Return whether the answer is the target and ended with the end token."""
    return answer.text == target and answer.stopped


def prefix(target: str, answer: Answer) -> bool:
    """Return whether the answer starts with the target."""
    return answer.text.startswith(target)


def contains(target: str, answer: Answer) -> bool:
    """Return whether the target is a part of the answer."""
    return target in answer.text


def mean_rates(rates: Mapping[str, RowRate], targets: Sequence[str], answers: Sequence[Answer]) -> dict[str, float]:
    """Return each rate as a fraction of the rows."""
    rows = list(zip(targets, answers, strict=True))
    return {name: rate(is_right(target, answer) for target, answer in rows) for name, is_right in rates.items()}


def row_rates(task: str) -> dict[str, RowRate]:
    """Return the rates that a task declares for a single answer; empty if there are none."""
    rates: dict[str, RowRate] = _declared(task, "ROW_RATES") or {}
    return rates


def row_kinds(task: str) -> Callable[[str, str], RowKinds] | None:
    """Return the function that a task defines for the kinds of a row; None if it uses `lengths`."""
    function: Callable[[str, str], RowKinds] | None = _declared(task, "row_kinds")
    return function


def lengths(target: str, context: str) -> RowKinds:
    """Return the default kinds of a row: the lengths of its context and of its target."""
    return {"characters of the context": len(context), "characters of the target": len(target)}


def _declared(task: str, name: str) -> Any:
    """Return an attribute of the module of a task; None if there is no such task or attribute."""
    module = f"pretrain.tasks.{task}"
    if not task.isidentifier() or importlib.util.find_spec(module) is None:
        return None
    return getattr(importlib.import_module(module), name, None)
