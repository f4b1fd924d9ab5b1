"""Scores of the nl_rx task. Invariant 7: exact, prefix, contains and stopped are reported separately."""

import pytest

from data_prep.nlrx_grammar import generate
from pretrain.tasks import nl_rx
from pretrain.tasks.nl_rx import score
from pretrain.tasks.regex_equality import compare
from pretrain.tasks.scoring import Answer
from tests.pretrain.tasks.shared_data import empty_answers, gold_answers, real_rows, rotated


def test_each_rate_follows_its_definition():
    targets = [".*a.*"] * 7 + ["~(.*)", "(a)|(b)"]
    answers = [
        Answer(".*a.*", True),
        Answer(".*a.*", False),
        Answer(".*a.*(b)", True),
        Answer("(.*a.*)", True),
        Answer("", False),
        Answer("(.*a.*", True),
        Answer("(.*a.*)", False),
        Answer("~(.*)", True),
        Answer("(b)|(a)", True),
    ]
    metrics, counts = score(targets, answers, [True] * 2 + [False] * 7)
    assert metrics == pytest.approx(
        {
            "exact": 2 / 9,
            "equal": 4 / 9,
            "prefix": 4 / 9,
            "contains": 7 / 9,
            "stopped": 6 / 9,
            "exact_unseen": 1 / 2,
            "equal_unseen": 1 / 2,
            "exact_proper": 1 / 8,
            "equal_proper": 3 / 8,
            "undecided": 0,
        }
    )
    assert counts == {"proper": 8, "unseen": 2}


def targets_of(kind):
    """Return targets of the NL-RX grammar or of the public NL-RX-SYNTH."""
    if kind == "grammar":
        return [generate(0, "test", index)[1] for index in range(150)]
    return [row.target for row in real_rows("nl-rx-synth/test.jsonl", rows=1000)]


@pytest.mark.parametrize("kind", ["grammar", "nl-rx-synth"])
def test_gold_empty_and_shuffled_answers(kind):
    targets = targets_of(kind)
    new = [True] * len(targets)
    metrics, _ = score(targets, gold_answers(targets), new)
    assert {name: value for name, value in metrics.items() if value != 1} == {"undecided": 0}
    metrics, _ = score(targets, empty_answers(targets), new)
    assert {name: value for name, value in metrics.items() if value != 0} == {"stopped": 1}
    shuffled = rotated(targets)
    metrics, _ = score(targets, gold_answers(shuffled), new)
    pairs = list(zip(targets, shuffled, strict=True))
    assert metrics["exact"] == sum(target == answer for target, answer in pairs) / len(pairs)
    assert metrics["equal"] == sum(compare(target, answer).equal is True for target, answer in pairs) / len(pairs)
    assert metrics["exact"] < metrics["equal"] < 0.1  # many published targets denote the empty language


def test_exploding_regexes_are_undecided_and_skipped_after_a_few(monkeypatch):
    compared = []
    monkeypatch.setattr(nl_rx, "MOST_UNDECIDED", 1)
    monkeypatch.setattr(nl_rx, "compare", lambda *pair: compared.append(pair) or compare(*pair))
    exploding = [f"(.*a.{{20}})|(.*a{number}.{{20}})" for number in range(100)]
    exploding += ["~((" * 200 + "a" + "))" * 200, "(((a{9}){9}){9}){9}", "(" * 100_000]
    metrics, _ = score([".*a.{20}"] * len(exploding), gold_answers(exploding), [True] * len(exploding))
    assert len(compared) == 1, "the comparisons must stop early, because each one takes some seconds"
    assert (metrics["exact"], metrics["equal"]) == (0, 0) and metrics["undecided"] > 0.9
    # Whether this target is proper is undecided too.
    assert score(["(((a{9}){9}){9}){9}"], gold_answers([""]), None)[1] == {"proper": 0}
