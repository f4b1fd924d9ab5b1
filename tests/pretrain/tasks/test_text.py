"""The task for custom text: gold, empty and shuffled answers, and the scores of sacrebleu."""

import sys

import pytest

from data_prep.utils.console import UserError
from pretrain.config import load_config
from pretrain.tasks import text
from pretrain.tasks.scoring import Answer
from tests.commands import tiny_config, write_config
from tests.pretrain.tasks.shared_data import empty_answers, gold_answers, rotated, write_rows

TARGETS = ["A short title", "Another, longer title of a text", "Ein kurzer Titel", "短い題名"]


def test_gold_empty_and_shuffled_answers():
    assert text.score(TARGETS, gold_answers(f" {target}\n" for target in TARGETS), [True, False, False, False]) == {
        "exact": 1,
        "prefix": 1,
        "contains": 1,
        "stopped": 1,
        "exact_unseen": 1,
    }
    assert text.score(TARGETS, empty_answers(TARGETS), None) == {"exact": 0, "prefix": 0, "contains": 0, "stopped": 1}
    assert text.score(TARGETS, gold_answers(rotated(TARGETS)), None)["exact"] == 0
    unended = [Answer(target + " and so on", False) for target in TARGETS]
    assert text.score(TARGETS, unended, None) == {"exact": 0, "prefix": 1, "contains": 1, "stopped": 0}
    assert text.score(["title"], [Answer("the title", True)], None) == {
        "exact": 0,
        "prefix": 0,
        "contains": 1,
        "stopped": 1,
    }


def test_similarities_equal_sacrebleu_as_fractions():
    pytest.importorskip("sacrebleu")
    assert text.similarities(TARGETS, gold_answers(TARGETS), []) == {}
    perfect = text.similarities(TARGETS[:3], gold_answers(TARGETS[:3]), ["chrf", "bleu"])
    assert perfect == {"chrf": pytest.approx(1), "bleu": pytest.approx(1)}
    assert text.similarities(TARGETS, empty_answers(TARGETS), ["chrf"]) == {"chrf": 0}
    reference = "the cat is on the mat today"
    # n-gram precisions of 6/6, 4/5, 2/4 and 1/3, and a brevity penalty of exp(1 - 7/6)
    bleu = text.similarities([reference], gold_answers(["the cat is on mat today"]), ["bleu"])["bleu"]
    assert bleu == pytest.approx((6 / 6 * 4 / 5 * 2 / 4 * 1 / 3) ** (1 / 4) * 2.718281828 ** (1 - 7 / 6))


def test_a_missing_package_is_reported_at_startup(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    write_rows(tmp_path / "test.jsonl", [{"text": "a", "code": "b"}])
    task = {"name": "text", "test": str(tmp_path / "test.jsonl"), "similarity": ["bleu"]}
    config = load_config(write_config(tmp_path, tiny_config(tmp_path, evaluation={"tasks": [task]})))
    with pytest.raises(
        UserError,
        match=r"tasks\.0\.similarity needs the package sacrebleu, which is not installed; "
        r"run pip install '\.\[similarity\]'",
    ):
        config.evaluation.tasks[0].check_requirements(config.data, "evaluation.tasks.0")
