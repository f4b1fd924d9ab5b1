"""Scores of the nl_rx task. Invariant 7: exact, prefix, contains and stopped are reported apart."""

import pytest

from pretrain.evaluation.generate import Answer
from pretrain.evaluation.tasks.nl_rx import score


def test_each_rate_counts_what_it_says():
    targets = [".*a.*", ".*a.*", ".*a.*", ".*a.*", ".*a.*"]
    answers = [Answer(".*a.*", True), Answer(".*a.*", False), Answer(".*a.*(b)", True), Answer("(.*a.*)", True), Answer("", False)]
    assert score(targets, answers) == pytest.approx({"exact": 1 / 5, "prefix": 3 / 5, "contains": 4 / 5, "stopped": 3 / 5})
