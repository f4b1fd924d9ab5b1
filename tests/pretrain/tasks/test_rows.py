"""Rates and kinds of single rows agree with the metrics of the tasks."""

import pytest

from pretrain.tasks import gsm8k, labels, nl_rx, task_configs, text
from pretrain.tasks.directions import metric_directions
from pretrain.tasks.rows import lengths, row_kinds, row_rates
from pretrain.tasks.scoring import Answer

ANSWERS = [Answer("a", True), Answer("a", False), Answer(" a b", True), Answer("#### 3", True), Answer("", True)]
TARGETS = ["a", "a", "a", "x #### 3.0", "#### 3"]


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("nl_rx", nl_rx.score(TARGETS, ANSWERS, None)[0]),
        ("text", text.score(TARGETS, ANSWERS, None)),
        ("gsm8k", gsm8k.score(TARGETS, ANSWERS)[0]),
        ("yelp", labels.score(TARGETS, sorted(set(TARGETS)), [[0.0, 1.0, 2.0]] * 5, ANSWERS)),
    ],
)
def test_the_mean_of_a_rate_over_rows_is_the_metric(task, metrics):
    rates = row_rates(task)
    assert len(rates) >= 3
    for name, is_right in rates.items():
        hits = [is_right(target, answer) for target, answer in zip(TARGETS, ANSWERS, strict=True)]
        assert sum(hits) / len(hits) == metrics[name], name


def test_declared_rates_are_metrics_of_their_task_where_higher_is_better():
    declaring = {task for task in task_configs() if row_rates(task)}
    assert declaring == {"nl_rx", "text", "gsm8k", "spider", "rotten_tomatoes", "yelp"}
    for task in declaring:
        assert {metric_directions(task)[name] for name in row_rates(task)} == {"higher"}
    assert row_rates("nothing") == row_rates("a.b") == row_rates("validation") == {} and row_kinds("a.b") is None


@pytest.mark.parametrize(
    ("target", "operators", "depth"),
    [
        (".*dog.*", {"any text: .*"}, "0 or 1"),
        ("(dog)|([0-9])", {"or: |"}, "0 or 1"),
        (r"~((\b.\b)&(x))", {"not: ~", "and: &", r"word boundary: \b"}, "2"),
        ("(((a)+)*){2,}", {"repeated: *, +, ?", "repeated: {n,}"}, "3 or more"),
        ("..*", {"any text: .*"}, "0 or 1"),
        (r"[|&~*]\|\(\(\{[^\]+]", set(), "0 or 1"),  # characters, not operators
        ("([", set(), "0 or 1"),
        ("", set(), "0 or 1"),
    ],
)
def test_kinds_of_a_regex(target, operators, depth):
    found = row_kinds("nl_rx")(target, "context")
    assert set(found["operators"]) == operators and found["nested parentheses"] == (depth,)
    assert found["characters of the target"] == len(target)


def test_other_tasks_use_lengths():
    assert row_kinds("text") is None
    assert lengths("abc", "") == {"characters of the context": 0, "characters of the target": 3}
