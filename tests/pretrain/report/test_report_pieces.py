"""Parts of reports: bands over seeds, projected embeddings, comparable results, metrics and example answers."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.utils.console import UserError
from pretrain.report.curves import join
from pretrain.report.embeddings import project
from pretrain.report.examples import Answer, Example
from pretrain.report.runs import Metric, Run, comparison_key


def test_seeds_at_the_same_steps_are_averaged_step_by_step():
    band = join(
        [([10, 20], np.array([1.0, 2.0]), np.array([5.0, 3.0])), ([10, 20], np.array([3.0, 4.0]), np.array([7.0, 4.0]))]
    )
    assert [part.tolist() for part in band] == [[2, 3], [6, 3.5], [5, 3], [7, 4]]


def test_a_shorter_seed_ends_the_band():
    band = join(
        [
            ([1, 2, 3], np.array([10.0, 20.0, 30.0]), np.array([3.0, 2.0, 1.0])),
            ([1, 2], np.array([10.0, 25.0]), np.array([4.0, 1.0])),
        ]
    )
    assert band.x.tolist() == [10, 20, 25] and band.mean.tolist() == pytest.approx([3.5, 2.0, 1.25])
    assert (band.low <= band.mean).all() and (band.mean <= band.high).all()


def test_the_projection_keeps_the_distances_of_points_in_a_plane():
    random = np.random.default_rng(0)
    angles = random.uniform(0, 2 * np.pi, (2, 40))
    basis, _ = np.linalg.qr(random.normal(size=(16, 2)))
    first, second = (np.stack([np.cos(angle), np.sin(angle)], axis=1) @ basis.T for angle in angles)
    found = project(("a", "b"), 7 * first, second)
    assert found.explained == pytest.approx(1)
    assert np.linalg.norm(found.first - found.second, axis=1) == pytest.approx(np.linalg.norm(first - second, axis=1))


def test_collapsed_embeddings_are_projected_to_one_point():
    random = np.random.default_rng(0)
    collapsed = 5 + 1e-3 * random.normal(size=(30, 8))
    found = project(("a", "b"), collapsed, collapsed)
    assert np.abs(np.concatenate([found.first, found.second])).max() < 1e-3
    same = project(("a", "b"), np.ones((5, 4)), np.ones((5, 4)))
    assert np.abs(same.first).max() < 1e-12
    for wrong in (np.ones((2, 4)), np.full((5, 4), np.nan)):
        with pytest.raises(UserError):
            project(("a", "b"), wrong, wrong)


def test_results_are_compared_by_the_content_of_files_or_the_name_of_the_data_set():
    def result(**test):
        is_local = test["type"] == "json" or "/" in test["path"]
        settings = {"test": test, "files": {f"{test['path']}/rows.jsonl": "the same"} if is_local else {}}
        return comparison_key({"task": "a", "settings": settings, "rows": 10}, {})

    assert result(type="json", path="here") == result(type="json", path="there")
    assert result(type="hub", path="a", hub_split="test") != result(type="hub", path="a", hub_split="validation")
    assert result(type="hub", path="a", hub_split="test") != result(type="hub", path="b", hub_split="test")
    assert result(type="hub", path="./a", hub_split="test") == result(type="hub", path="./b", hub_split="test")
    assert result(type="hub", path="./a", hub_split="x") != result(type="hub", path="./b", hub_split="test")


def test_results_with_different_finetunings_compare_if_the_runs_are_configured_so():
    def result(configured, evaluated):
        return comparison_key(
            {"task": "a", "settings": evaluated, "rows": 10},
            {"evaluation": {"tasks": [{"name": "nl_rx", "label": "a"} | configured]}},
        )

    full, lora = {"finetune": {"epochs": 2}}, {"finetune": {"epochs": 2}, "finetune_lora": {"rank": 8}}
    assert result(full, full) == result(lora, lora)
    assert len({result(full, full), result(full, lora), result(full, {}), result({}, full)}) == 4
    assert result({}, {}) == result(full, {}), "neither run was finetuned"


def run_with(metrics, directions=None, tasks=(), tags=()):
    """Return a run of one step with a result of each task: {title: {metric: value}}.

    Without `directions`, the results have the format of older versions.
    """
    results = [
        {"task": task, "step": 1, "settings": {}, "rows": 5, "metrics": task_metrics}
        | ({"directions": directions} if directions else {})
        for task, task_metrics in metrics.items()
    ]
    line = {"step": 1, "tokens": 9, "seconds": 1.0} | dict.fromkeys(tags, 0.5)
    config = {"name": "run", "objective": {"name": "next_token"}, "evaluation": {"tasks": list(tasks)}}
    return Run(Path("run"), config, {}, {"status": "finished"}, [line], results)


@pytest.mark.parametrize(
    "metric, higher",
    [
        ("nl_rx/exact", True),
        ("retrieval/mrr", True),
        ("retrieval/code_to_text_recall_at_1", True),
        ("validation/embedding/effective_rank", True),
        ("validation/loss/lm", False),
        ("validation/embedding/shuffled_cosine", False),
        ("loss/jepa", False),
        ("geometry/shuffled_cosine", False),
        ("geometry/linear_residual_unseen", False),
        ("nl_rx/undecided", False),
    ],
)
def test_a_metric_has_the_direction_that_its_task_declares(metric, higher):
    task, _, name = metric.partition("/")
    run = run_with({}, tags=[metric]) if task == "validation" else run_with({task: {name: 0.5}})
    assert Metric.parse(metric, [run]).higher_is_better == higher


def test_a_labelled_task_has_the_directions_of_its_kind_and_a_result_may_record_its_own():
    labelled = run_with({"geography": {"execution": 0.5}}, tasks=[{"name": "spider", "label": "geography"}])
    assert Metric.parse("geography/execution", [labelled]).higher_is_better
    recorded = run_with({"speech": {"said_wer": 0.5, "said_acc": 0.5}}, {"said_wer": "lower", "said_acc": "higher"})
    assert [Metric.parse(f"speech/said_{name}", [recorded]).higher_is_better for name in ("wer", "acc")] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    "metric",
    ["lm_eval/said_wer", "lm_eval/said_brier_score", "lm_eval/said_mse", "nl_rx/nll", "geometry/paired_cosine"],
)
def test_an_undeclared_direction_must_be_given(metric):
    task, _, name = metric.partition("/")
    run = run_with({task: {name: 0.5}})
    with pytest.raises(UserError, match=rf"write {metric}:higher or {metric}:lower"):
        Metric.parse(metric, [run])
    assert [Metric.parse(f"{metric}:{word}", [run]).higher_is_better for word in ("higher", "lower")] == [True, False]
    assert Metric.parse(metric, [run], Metric(task, name, False)) == Metric(task, name, False), (
        "the study declares the direction"
    )


def test_arms_with_the_same_answer_are_grouped():
    example = Example("context", "t", [Answer("a", "x", 0, 3), Answer("b", "t", 3, 3), Answer("c", "x", 1, 3)])
    assert {text: [answer.arm for answer in answers] for text, answers in example.by_text.items()} == {
        "t": ["b"],
        "x": ["a", "c"],
    }
    assert list(example.by_text) == ["t", "x"]
