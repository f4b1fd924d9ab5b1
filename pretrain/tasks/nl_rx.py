"""nl_rx: write the regex for a description, scored as text and by what it matches.

exact: the answer is the target and ended with the end token. equal: it ended so and matches the same lines, by the project's own checker
(pretrain/tasks/regex_equality.py); an empty answer is equal to nothing, though some targets match the empty line alone.
prefix: it starts with the target (what the LLM-JEPA paper reports). contains: the target stands in it. stopped: it ended with the end
token. `_proper`: on targets that match some lines, but not every one. `_unseen`: on targets that stand neither in the training corpus
nor in the task's train rows. undecided: share of answers that the checker could not decide within its limits, which count as not equal.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

from pretrain.tasks.directions import MetricDirections, higher
from pretrain.tasks.options import AnswerTask
from pretrain.tasks.regex_equality import compare, is_nontrivial
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
MOST_UNDECIDED = 50
"""Comparisons given up, at some seconds each, after which the others are not tried."""


class Config(AnswerTask):
    """Write the regex for a description. Without `test` it is scored on 1,000 unseen pairs of the embedded grammar, or `rows` of them."""

    name: Literal["nl_rx"]

    HAS_DEFAULT_TEST_ROWS: ClassVar[bool] = True


def evaluate(run: TaskRun) -> TaskResult:
    """Answer the test rows and score the answers."""
    rows = run.read_test()
    answers = run.generate_answers(rows)
    metrics, counts = score([row.target for row in rows], answers, run.unseen(rows))
    return TaskResult(len(rows), metrics, counts | count_too_long_contexts(answers))


def score(
    targets: Sequence[str], answers: Sequence[Answer], is_unseen: Sequence[bool] | None
) -> tuple[dict[str, float], dict[str, int]]:
    """Rates, and the rows behind those that are not over all of them. An exact answer is equal, even where the target is no regex."""
    rows = list(zip(targets, answers, strict=True))
    exact = [answer.text == target and answer.stopped for target, answer in rows]
    verdicts = _verdicts(
        (target, answer.text)
        for target, answer in rows
        if answer.stopped and answer.text.strip() and answer.text != target
    )
    same = [
        answer.stopped and (answer.text == target or verdicts.get((target, answer.text), False))
        for target, answer in rows
    ]
    equal = [verdict is True for verdict in same]
    kinds = {target: is_nontrivial(target) for target in set(targets)}
    proper = [kinds[target] is True for target in targets]
    return {
        "exact": rate(exact),
        "equal": rate(equal),
        "prefix": rate(answer.text.startswith(target) for target, answer in rows),
        "contains": rate(target in answer.text for target, answer in rows),
        "stopped": rate(answer.stopped for _, answer in rows),
        **rate_over_subset("equal_unseen", equal, is_unseen),
        **rate_over_subset("exact_unseen", exact, is_unseen),
        **rate_over_subset("equal_proper", equal, proper),
        **rate_over_subset("exact_proper", exact, proper),
        "undecided": rate(verdict is None for verdict in same),
    }, {"proper": sum(proper)} | ({"unseen": sum(is_unseen)} if is_unseen is not None else {})


def _verdicts(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], bool | None]:
    """Whether the two of each pair match the same lines; None: undecided."""
    verdicts: dict[tuple[str, str], bool | None] = {}
    undecided = 0
    for pair in dict.fromkeys(pairs):
        verdicts[pair] = compare(*pair).equal if undecided < MOST_UNDECIDED else None
        undecided += verdicts[pair] is None
    return verdicts
