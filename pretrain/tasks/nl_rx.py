"""nl_rx: write the regex for a description, scored as text and by the lines that it matches.

Metrics, as fractions of the test rows:

    exact       the answer is the target and ended with the end token
    equal       the answer ended with the end token and matches the same lines as the target
    prefix      the answer starts with the target (the measure of the LLM-JEPA paper)
    contains    the target is a part of the answer
    stopped     the answer ended with the end token
    undecided   the checker could not decide within its limits; these answers count as not equal

Suffix `_proper`: over targets that match some lines, but not all. Suffix `_unseen`: over targets that are neither in
the training corpus nor in the task's train rows. pretrain/tasks/regex_equality.py checks whether two regexes match the
same lines. An empty answer is never equal, even to a target that matches only the empty line.
"""

import re
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

from data_prep.utils.progress import Progress
from pretrain.tasks.directions import MetricDirections, higher
from pretrain.tasks.options import AnswerTask
from pretrain.tasks.regex_equality import compare, is_nontrivial
from pretrain.tasks.rows import RowKinds, RowRate, contains, exact, mean_rates, prefix, stopped
from pretrain.tasks.scoring import Answer, TaskResult, TaskRun, count_too_long_contexts, rate, rate_over_subset

METRICS: MetricDirections = {
    **higher(
        "exact",
        "equal",
        "prefix",
        "contains",
        "stopped",
        "equal_unseen",
        "exact_unseen",
        "equal_proper",
        "exact_proper",
    ),
    "undecided": "lower",
}
ROW_RATES: dict[str, RowRate] = {"exact": exact, "prefix": prefix, "contains": contains, "stopped": stopped}
OPERATORS = {
    "|": "or: |",
    "&": "and: &",
    "~": "not: ~",
    r"\b": r"word boundary: \b",
    ".*": "any text: .*",
    "*": "repeated: *, +, ?",
    "+": "repeated: *, +, ?",
    "?": "repeated: *, +, ?",
    "{": "repeated: {n,}",
}
"""Kinds of rows by the operators that the target uses."""
SYMBOL = re.compile(r"\\.|\[\^?(?:\\.|[^\]\\])*\]|\.\*|.", re.DOTALL)
"""An escaped character, a class of characters, `.*`, or a single character."""
MOST_UNDECIDED = 50
"""Maximum number of undecided comparisons, which take some seconds each; after it, no pair is compared."""


class Config(AnswerTask):
    """Options of the task that writes the regex for a description.

    Without `test`, the test rows are `rows` (default 1,000) unseen pairs of the embedded grammar.
    """

    name: Literal["nl_rx"]

    HAS_DEFAULT_TEST_ROWS: ClassVar[bool] = True
    SCORING_READS_TRAIN: ClassVar[bool] = True


def evaluate(run: TaskRun) -> TaskResult:
    """Generate answers to the test rows and score the answers."""
    rows = run.read_test()
    answers = run.generate_answers(rows)
    metrics, counts = score([row.target for row in rows], answers, run.unseen(rows))
    return TaskResult(len(rows), metrics, counts | count_too_long_contexts(answers))


def score(
    targets: Sequence[str], answers: Sequence[Answer], is_unseen: Sequence[bool] | None
) -> tuple[dict[str, float], dict[str, int]]:
    """Return the metrics, and the number of rows of each subset (`proper`, `unseen`) that has its own metrics.

    An exact answer counts as equal, even if the target is not a valid regex.
    """
    rows = list(zip(targets, answers, strict=True))
    rates = mean_rates(ROW_RATES, targets, answers)
    is_exact = [exact(target, answer) for target, answer in rows]
    verdicts = _verdicts(
        (target, answer.text)
        for target, answer in rows
        if answer.stopped and answer.text.strip() and answer.text != target
    )
    equality = [
        answer.stopped and (answer.text == target or verdicts.get((target, answer.text), False))
        for target, answer in rows
    ]
    equal = [verdict is True for verdict in equality]
    nontrivial = {target: is_nontrivial(target) for target in set(targets)}
    proper = [nontrivial[target] is True for target in targets]
    return {
        "exact": rates["exact"],
        "equal": rate(equal),
        **rates,
        **rate_over_subset("equal_unseen", equal, is_unseen),
        **rate_over_subset("exact_unseen", is_exact, is_unseen),
        **rate_over_subset("equal_proper", equal, proper),
        **rate_over_subset("exact_proper", is_exact, proper),
        "undecided": rate(verdict is None for verdict in equality),
    }, {"proper": sum(proper)} | ({"unseen": sum(is_unseen)} if is_unseen is not None else {})


def _verdicts(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], bool | None]:
    """Return for each pair of regexes whether both match the same lines; None if undecided."""
    verdicts: dict[tuple[str, str], bool | None] = {}
    undecided = 0
    different = list(dict.fromkeys(pairs))
    with Progress("comparing expressions", len(different), "pairs") as progress:
        for pair in different:
            verdicts[pair] = compare(*pair).equal if undecided < MOST_UNDECIDED else None
            undecided += verdicts[pair] is None
            progress.update(1)
    return verdicts


def row_kinds(target: str, context: str) -> RowKinds:
    """Return the operators, the nesting depth of the parentheses, and the length of the target.

    The target may be any text: only its symbols are read, not its syntax.
    """
    symbols = SYMBOL.findall(target)
    depth = deepest = 0
    for symbol in symbols:
        depth += (symbol == "(") - (symbol == ")")
        deepest = max(deepest, depth)
    return {
        "operators": tuple(sorted({OPERATORS[symbol] for symbol in symbols if symbol in OPERATORS})),
        "nested parentheses": ("0 or 1" if deepest < 2 else "2" if deepest == 2 else "3 or more",),
        "characters of the target": len(target),
    }
