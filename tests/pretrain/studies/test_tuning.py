"""Tuning of a study: the grid, its extension, the rows that decide, and what is recorded before the first score."""

import json
import math

import pytest
import yaml

from data_prep.utils.console import UserError
from data_prep.utils.files import read_json_lines
from pretrain.report.arms import Comparison, read_comparison
from pretrain.report.runs import Metric
from pretrain.report.sensitivity import sensitivity
from pretrain.run_folder import read_metrics
from pretrain.studies.tuning import Trial, best_trial, combinations, edge_values, trial_name, value_beyond
from tests.commands import run_command
from tests.pretrain.report.report_helpers import parse_table, render_report
from tests.pretrain.studies.fake_runs import FakeStudies

STUDY = ["python", "launcher/study.py"]
RATE = "train.learning_rate"
TUNE = {"keys": {RATE: [1.0e-3, 4.0e-3]}, "seeds": [7], "extensions": 1}


def test_a_grid_is_all_combinations_and_their_names_have_the_values():
    found = combinations({RATE: [1e-3, 2e-3], "objective.weight": [0.5]})
    assert found == [{RATE: 1e-3, "objective.weight": 0.5}, {RATE: 2e-3, "objective.weight": 0.5}]
    assert trial_name("cosine", found[1]) == "cosine.learning_rate-0.002.weight-0.5"
    assert combinations({}) == [{}] and trial_name("plain", {}) == "plain"


def test_the_best_trial_has_the_best_mean_and_among_equal_ones_is_the_first():
    trials = [Trial({"a": number}, dict(enumerate(scores))) for number, scores in enumerate([(1, 3), (2, 2), (0, 3)])]
    assert best_trial(trials, True) is trials[0] and best_trial(trials, False) is trials[2]
    diverged = [Trial({"a": 3}, {0: math.nan, 1: 9}), Trial({"a": 4}, {})]
    assert best_trial([*diverged, *trials], True) is trials[0] and best_trial([*diverged, *trials], False) is trials[2]
    with pytest.raises(UserError, match="no trial of an arm has finite scores"):
        best_trial(diverged, True)


@pytest.mark.parametrize(
    ("values", "best", "expected"),
    [
        ([1e-3, 2e-3, 4e-3], 4e-3, 8e-3),
        ([4e-3, 1e-3, 2e-3], 1e-3, 5e-4),
        ([1e-3, 2e-3, 4e-3], 2e-3, None),
        ([8, 12], 12, 18),
        ([8, 12], 8, 5),
        ([2], 2, None),
        (["cosine", "l2"], "l2", None),
        ([0, 0.5], 0.5, None),
        ([True, False], True, None),
    ],
)
def test_a_range_continues_its_last_ratio_beyond_the_edge(values, best, expected):
    edges = edge_values({"key": values}, {"key": best})
    beyond = value_beyond(*edges["key"]) if edges else None
    assert beyond == expected and type(beyond) is type(expected)


@pytest.mark.parametrize(
    ("tune", "expected"),
    [
        (TUNE | {"seeds": [1]}, "tune.seeds and seeds share 1"),
        (TUNE | {"seeds": [6], "pilot": True}, "tune.seeds and seeds share 6"),
        (TUNE | {"arms": {"jepa": {"objective.weight": [0.1, 0.5]}}}, "different numbers of trials (plain 2, jepa 4)"),
        (TUNE | {"arms": {"jepq": {"objective.weight": [0.1]}}}, "tune.arms names 'jepq', which is not an arm"),
        (TUNE | {"keys": {RATE: [1e-3, 1e-3]}}, "none of them twice"),
        (TUNE | {"keys": {"train.tokens": [10]}}, "the budget is matched"),
        (TUNE | {"keys": {"data.sequence_length": [64]}}, "cannot be tuned"),
    ],
)
def test_an_unfair_or_useless_tuning_is_refused(write_study, tune, expected):
    seeds = {"seeds": {"detect": 0.1, "pilot": [1, 2, 3], "most": 3}} if tune.pop("pilot", False) else {}
    done = run_command([*STUDY, str(write_study(tune=tune, **seeds)), "--dry-run"], check=False)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr


def test_rows_that_are_tested_may_not_decide(write_study, folder):
    base = yaml.safe_load((folder / "base.yaml").read_text())
    base["evaluation"]["tasks"][0]["validation"] = base["evaluation"]["tasks"][0]["test"]
    (folder / "tested.yaml").write_text(yaml.safe_dump(base))
    done = run_command(
        [*STUDY, str(write_study(tune=TUNE, name="tested")), f"base={folder / 'tested.yaml'}"], check=False
    )
    assert done.returncode == 2 and "validation and test of loss are the same rows" in done.stderr


def test_a_study_is_tuned_before_it_is_compared(write_study, folder):
    tune = {"keys": {RATE: [4.0e-3]}, "arms": {"jepa": {RATE: [1.0e-3, 4.0e-3]}}, "seeds": [7], "equal": False}
    path, study = write_study(tune=tune | {"extensions": 0}, name="tuned", primary="jepa"), folder / "studies" / "tuned"
    shown = run_command([*STUDY, str(path), "--dry-run"]).stdout
    assert "tuning first: 3 trials (1, 2 by arm) x 1 seeds = 3 runs" in shown and not study.exists()
    done = run_command([*STUDY, str(path)])
    assert "hours for the trials and" in done.stdout
    found = json.loads((study / "study.json").read_text())["tune"]
    assert found["plans"][0]["rows"]["origin"] == "the validation split of the corpus"
    scores = {}
    for rate in (0.001, 0.004):
        run_dir = study / "tuning" / f"jepa.learning_rate-{rate}-seed7"
        (result,) = read_json_lines(run_dir / "evaluation" / "results.jsonl")
        assert result["rows"] == len(read_json_lines(study / "tuning" / "validation.jsonl"))
        scores[rate] = result["metrics"]["lm"]
    assert found["best"] == {"plain": {RATE: 0.004}, "jepa": {RATE: min(scores, key=scores.__getitem__)}}
    text, _ = render_report(study)
    assert "The arms were tuned with different numbers of trials" in text and read_metrics(study / "plain-seed1")


def test_ranges_are_extended_for_all_arms_and_the_best_values_are_compared(write_study, folder, monkeypatch):
    studies = FakeStudies(monkeypatch)
    studies.rate_effect, studies.best_rate = 0.01, 0.016
    path = write_study(tune=TUNE, name="extended", primary="jepa")
    code, study = studies.start(path)
    assert code == 0
    record = json.loads((study / "study.json").read_text())
    tune, trials = record["tune"], json.loads((study / "tuning" / "study.json").read_text())
    assert record["primary"] == "jepa" and len(tune["plans"]) == 1
    assert tune["plans"][0]["grids"] == {arm: {RATE: [1e-3, 4e-3]} for arm in ("plain", "jepa")}
    assert tune["extensions"] == [{RATE: [0.016]}]
    rates = (0.001, 0.004, 0.016)
    assert set(trials["arms"]) == {f"{arm}.learning_rate-{rate}" for arm in ("plain", "jepa") for rate in rates}
    for arm in ("plain", "jepa"):
        scores = {}
        for rate in rates:
            run_dir = study / "tuning" / f"{arm}.learning_rate-{rate}-seed7"
            (result,) = read_json_lines(run_dir / "evaluation" / "results.jsonl")
            config = yaml.safe_load((run_dir / "config.yaml").read_text())
            assert config["train"]["learning_rate"] == rate and config["seed"] == 7
            assert config["evaluation"]["tasks"][0]["test"] == str(study / "tuning" / "validation.jsonl")
            scores[rate] = result["metrics"]["lm"]
        assert tune["best"][arm] == {RATE: 0.016} and tune["at_edge"][arm] == [RATE]
        assert {trial["values"][RATE]: trial["scores"]["7"] for trial in tune["trials"][arm]} == scores
        compared = yaml.safe_load((study / f"{arm}-seed1" / "config.yaml").read_text())
        assert compared["train"]["learning_rate"] == 0.016 and compared["seed"] == 1
        assert compared["evaluation"]["tasks"][0]["test"] == str(folder / "pairs.jsonl")

    assert studies.start(path)[0] == 0 and studies.trained == []
    text, page = render_report(study)
    assert "The arms were tuned with 3 trials each of train.learning_rate, by loss/lm on the validation split" in text
    table = parse_table(text.partition("## Sensitivity")[2])
    assert set(table) == {RATE.replace("_", "\\_")} or set(table) == {RATE}
    assert "<h2>Sensitivity</h2>" in page


def test_the_rows_of_the_task_decide_if_it_has_any(write_study, folder, monkeypatch, tmp_path):
    rows = tmp_path / "validation.jsonl"
    rows.write_text((folder / "pairs.jsonl").read_text().partition("\n")[0] + "\n")
    base = yaml.safe_load((folder / "base.yaml").read_text())
    base["evaluation"]["tasks"][0]["validation"] = str(rows)
    base["data"]["path"] = str(folder / "corpus_with_rows")
    (folder / "with_rows.yaml").write_text(yaml.safe_dump(base))
    studies = FakeStudies(monkeypatch)
    studies.failing = {"jepa.learning_rate-0.004-seed7"}
    path = write_study(tune=TUNE | {"extensions": 0}, name="with_rows", base="with_rows.yaml")
    code, study = studies.start(path)
    assert code == 1 and json.loads((study / "study.json").read_text())["tune"]["plans"][0]["rows"]["source"] == str(
        rows
    )
    trial = yaml.safe_load((study / "tuning" / "jepa.learning_rate-0.001-seed7" / "config.yaml").read_text())
    assert trial["evaluation"]["tasks"][0]["test"] == str(rows)
    with pytest.raises(UserError, match="the tuning is not finished, so there is nothing to compare yet"):
        read_comparison([study], None, None)


def test_sensitivity_is_measured_along_a_key_at_the_best_values_of_other_keys():
    def trial(rate: float, weight: float, *scores: float) -> dict:
        return {
            "values": {"rate": rate, "weight": weight},
            "scores": {str(seed): score for seed, score in enumerate(scores)},
        }

    trials = [
        trial(4.0, 1.0, 0.80, 0.82),
        trial(1.0, 1.0, 0.70, 0.72),
        trial(2.0, 1.0, 0.79, 0.80),
        trial(8.0, 1.0, 0.80, 0.79),
        trial(16.0, 1.0, 0.81, 0.50),
        trial(4.0, 2.0, 0.99, 0.10),
    ]
    tune = {"trials": {"arm": trials}, "best": {"arm": {"rate": 4.0, "weight": 1.0}}, "at_edge": {"arm": ["weight"]}}
    comparison = Comparison("t", {}, None, Metric("task", "exact", True), "", "flops", tune=tune)
    rate, weight = (found[0] for found in sensitivity(comparison).values())
    assert rate.values == [1.0, 2.0, 4.0, 8.0, 16.0] and rate.best == 4.0 and not rate.at_edge
    assert [rate.values[index] for index in rate.good] == [2.0, 4.0, 8.0] and rate.width == 4.0
    assert rate.spread == pytest.approx(0.0110, abs=2e-4)
    assert weight.values == [1.0, 2.0] and weight.width == 1.0 and weight.at_edge
