"""Bands over seeds, the plane of the embeddings, and the rows that tell most."""

import numpy as np
import pytest

from data_prep.console import UserError
from pretrain.report.curves import join
from pretrain.report.embeddings import project
from pretrain.report.examples import Answer, Example
from pretrain.report.runs import Metric, identity


def test_seeds_at_the_same_steps_are_averaged_step_by_step():
    band = join([([10, 20], np.array([1.0, 2.0]), np.array([5.0, 3.0])), ([10, 20], np.array([3.0, 4.0]), np.array([7.0, 4.0]))])
    assert [part.tolist() for part in band] == [[2, 3], [6, 3.5], [5, 3], [7, 4]]


def test_a_shorter_seed_ends_the_band():
    band = join([([1, 2, 3], np.array([10.0, 20.0, 30.0]), np.array([3.0, 2.0, 1.0])), ([1, 2], np.array([10.0, 25.0]), np.array([4.0, 1.0]))])
    assert band.x.tolist() == [10, 20, 25] and band.mean.tolist() == pytest.approx([3.5, 2.0, 1.25])
    assert (band.low <= band.mean).all() and (band.mean <= band.high).all()


def test_the_plane_keeps_distances_of_what_lies_in_a_plane():
    random = np.random.default_rng(0)
    angles = random.uniform(0, 2 * np.pi, (2, 40))
    basis, _ = np.linalg.qr(random.normal(size=(16, 2)))
    first, second = (np.stack([np.cos(angle), np.sin(angle)], axis=1) @ basis.T for angle in angles)
    found = project(("a", "b"), 7 * first, second)
    assert found.explained == pytest.approx(1)
    assert np.linalg.norm(found.first - found.second, axis=1) == pytest.approx(np.linalg.norm(first - second, axis=1))


def test_collapsed_embeddings_are_a_spot():
    random = np.random.default_rng(0)
    collapsed = 5 + 1e-3 * random.normal(size=(30, 8))
    found = project(("a", "b"), collapsed, collapsed)
    assert np.abs(np.concatenate([found.first, found.second])).max() < 1e-3
    same = project(("a", "b"), np.ones((5, 4)), np.ones((5, 4)))
    assert np.abs(same.first).max() < 1e-12
    for wrong in (np.ones((2, 4)), np.full((5, 4), np.nan)):
        with pytest.raises(UserError):
            project(("a", "b"), wrong, wrong)


def test_results_compare_by_the_content_of_files_and_by_the_name_of_data_sets():
    def result(**test):
        settings = {"test": test, "files": {test["path"]: "the same"} if test["type"] == "json" else {}}
        return identity({"task": "a", "settings": settings, "rows": 10}, {})

    assert result(type="json", path="here") == result(type="json", path="there")
    assert result(type="hub", path="a", hub_split="test") != result(type="hub", path="a", hub_split="validation")


def test_results_compare_whatever_the_arms_finetune_if_it_is_what_they_say():
    def result(configured, evaluated):
        return identity({"task": "a", "settings": evaluated, "rows": 10}, {"evaluation": {"tasks": [{"name": "nl_rx", "label": "a"} | configured]}})

    two, lora = {"finetune": {"epochs": 2}}, {"finetune": {"epochs": 2}, "finetune_lora": {"rank": 8}}
    assert result(two, two) == result(lora, lora)
    assert len({result(two, two), result(two, lora), result(two, {}), result({}, two)}) == 4
    assert result({}, {}) == result(two, {}), "none was finetuned"


@pytest.mark.parametrize("metric, higher", [
    ("nl_rx/exact", True), ("retrieval/mrr", True), ("validation/embedding/effective_rank", True), ("validation/loss/lm", False),
    ("loss/jepa", False), ("lm_eval/wikitext_word_perplexity", False), ("lm_eval/wikitext_bits_per_byte", False),
    ("geometry/linear_residual_unseen", False), ("nl_rx/undecided", False), ("lm_eval/film_acc_norm", True)])
def test_less_of_a_loss_is_better(metric, higher):
    assert Metric.parse(metric).higher_is_better == higher


def test_arms_that_wrote_the_same_stand_together():
    example = Example("context", "t", [Answer("a", "x", 0, 3), Answer("b", "t", 3, 3), Answer("c", "x", 1, 3)])
    assert {text: [answer.arm for answer in answers] for text, answers in example.by_text.items()} == {"t": ["b"], "x": ["a", "c"]}
    assert list(example.by_text) == ["t", "x"]
