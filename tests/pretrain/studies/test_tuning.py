"""Tuning of a study: the grid, its extension, the rows that decide, and what is recorded before the first score."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml

from data_prep.utils.console import UserError
from data_prep.utils.files import read_json_lines
from pretrain.data.corpus import Corpus
from pretrain.report.arms import Comparison, read_comparison
from pretrain.report.runs import Metric
from pretrain.report.sensitivity import sensitivity
from pretrain.report.tables import sensitivity_rows
from pretrain.run_folder import read_metrics
from pretrain.studies.config import combinations, load_study
from pretrain.studies.tuning import Trial, best_trial, edge_values, trial_name, value_beyond
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
        ([0, 1, 2], 2, 4),
        ([0, 1, 2], 0, None),
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
        (
            TUNE | {"keys": {RATE: ["1e-3", 2e-3]}},
            f"{RATE}: 1e-3 is text in YAML; write it with a point, such as 1.0e-03",
        ),
        ({"seeds": [7]}, "tune has no keys to tune"),
        (TUNE | {"keys": {RATE: [1e-3, -1.0]}}, "arms.plain: train.learning_rate: Input should be greater than 0"),
        (TUNE | {"keys": {"train.learning_rat": [1e-3]}}, "unknown key 'train.learning_rat'"),
    ],
)
def test_an_unfair_or_useless_tuning_is_refused(write_study, tune, expected):
    seeds = {"seeds": {"detect": 0.1, "pilot": [1, 2, 3], "most": 3}} if tune.pop("pilot", False) else {}
    done = run_command([*STUDY, str(write_study(tune=tune, **seeds)), "--dry-run"], check=False)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr


def test_rows_that_are_tested_may_not_decide(write_study, folder):
    base = yaml.safe_load((folder / "base.yaml").read_text())
    base["evaluation"]["tasks"][0]["validation"] = base["evaluation"]["tasks"][0]["test"]
    base["data"]["path"] = str(folder / "corpus_of_tested")
    (folder / "tested.yaml").write_text(yaml.safe_dump(base))
    done = run_command(
        [*STUDY, str(write_study(tune=TUNE, name="tested")), f"base={folder / 'tested.yaml'}"], check=False
    )
    assert done.returncode == 2 and "of the 20 rows of validation of loss, 20 are test rows" in done.stderr


def test_a_study_is_tuned_before_it_is_compared(write_study, folder):
    tune = {"keys": {RATE: [4.0e-3]}, "arms": {"jepa": {RATE: [1.0e-3, 4.0e-3]}}, "seeds": [7], "equal": False}
    path, study = write_study(tune=tune | {"extensions": 0}, name="tuned", primary="jepa"), folder / "studies" / "tuned"
    shown = run_command([*STUDY, str(path), "--dry-run"]).stdout
    assert "tuning first: 3 trials (1, 2 by arm) x 1 seed = 3 runs" in shown and not study.exists()
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
            assert config["evaluation"]["tasks"][0]["test"]["path"] == str(study / "tuning" / "validation.jsonl")
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
    assert "The best value is at the edge of the range that was tried for" in text
    assert "values in between may score higher" not in text, "the best value is at the edge"


@pytest.mark.parametrize("parallel", [1, 2])
def test_the_hours_of_the_trials_and_of_the_compared_runs_are_shown(write_study, monkeypatch, capsys, parallel):
    studies = FakeStudies(monkeypatch)
    studies.step_seconds = 3e5  # 1,200 seconds per token
    tune = TUNE | {"extensions": 0, "seeds": [7, 8, 9]}
    path = write_study(tune=tune, name=f"hours{parallel}", matched_by="flops", seeds=[1, 2], parallel_runs=parallel)
    study = studies.start(path)[1]
    tokens = json.loads((study / "study.json").read_text())["arms"]["plain"]["matched"]["train.tokens"]
    hours_of_a_run = 1200 * tokens / 3600 / parallel
    shown = re.search(
        r"about ([\d.]+) hours for the trials and ([\d.]+) hours for 2 arms x 2 seeds", capsys.readouterr().out
    )
    assert [float(hours) for hours in shown.groups()] == pytest.approx(
        [12 * hours_of_a_run, 4 * hours_of_a_run], rel=0.02
    )


@pytest.fixture
def write_rows_study(write_study, folder):
    """Return a function that writes a study whose task has validation rows, and the rows that no other split has.

    Besides these, the file contains a test row and two training records.
    """
    corpus = Corpus(folder / "corpus", "train")
    views = [[corpus.tokenizer.decode(ids) for ids in corpus.tokens_by_view(record).values()] for record in (0, 5)]
    test = (folder / "pairs.jsonl").read_text().splitlines()[3]
    same_context = json.loads(test) | {"code": "(a)&(b)"}
    rows = [*(dict(zip(("text", "code"), texts, strict=True)) for texts in views), same_context, json.loads(test)]
    rows.insert(1, {"text": "a line that nobody has seen", "code": "(.*zebra.*)"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = yaml.safe_load((folder / "base.yaml").read_text())
    base["evaluation"]["tasks"][0]["validation"] = str(folder / "rows.jsonl")
    base["data"] |= {"decontaminate": False, "path": str(folder / "corpus_with_rows")}
    (folder / "with_rows.yaml").write_text(yaml.safe_dump(base))
    kept = [rows[1], same_context]
    return lambda name, **changes: (write_study(name=name, base="with_rows.yaml", **changes), kept)


def test_only_rows_that_are_neither_trained_on_nor_tested_decide(write_rows_study, monkeypatch):
    studies = FakeStudies(monkeypatch)
    path, kept = write_rows_study("rows", tune=TUNE | {"extensions": 0})
    code, study = studies.start(path)
    (plan,) = json.loads((study / "study.json").read_text())["tune"]["plans"]
    assert code == 0 and plan["rows"]["origin"] == "validation of loss" and plan["rows"]["rows"] == 2
    assert plan["rows"]["dropped"] == {"tested": 1, "trained": 2}
    for name in ("plain", "jepa"):
        trial = yaml.safe_load((study / "tuning" / f"{name}.learning_rate-0.001-seed7" / "config.yaml").read_text())
        assert read_json_lines(Path(trial["evaluation"]["tasks"][0]["test"]["path"])) == kept
        assert "validation" not in trial["evaluation"]["tasks"][0] and trial["data"]["decontaminate"] is False
    text, _ = render_report(study, page=False)
    assert "on validation of loss (2 rows; dropped: 1 test rows, 2 training records)" in text
    moved = studies.start(path, f"output_dir={study.parent / 'elsewhere'}")[1]  # the rows are in another folder
    (plan_there,) = json.loads((moved / "study.json").read_text())["tune"]["plans"]
    assert plan_there | {"time": ""} == plan | {"time": ""}


def test_rows_without_a_view_may_decide_if_the_corpus_keeps_such_records(write_rows_study, folder, monkeypatch):
    path, kept = write_rows_study("incomplete", tune=TUNE | {"extensions": 0})
    base = yaml.safe_load((folder / "with_rows.yaml").read_text())
    base["data"] |= {"missing_views": "keep", "path": str(folder / "corpus_of_incomplete")}
    (folder / "with_rows.yaml").write_text(yaml.safe_dump(base))
    incomplete = {"text": "a description without code", "code": None}
    with open(folder / "rows.jsonl", "a") as rows:
        rows.write(json.dumps(incomplete) + "\n")
    code, study = FakeStudies(monkeypatch).start(path)
    assert code == 0 and read_json_lines(study / "tuning" / "validation.jsonl") == [*kept, incomplete]


def test_a_task_that_finetunes_is_tuned_on_its_validation_rows(write_rows_study, write_study, folder, monkeypatch):
    studies = FakeStudies(monkeypatch)
    write_rows_study("unused")  # writes the files
    base = yaml.safe_load((folder / "with_rows.yaml").read_text())
    rows = read_json_lines(folder / "rows.jsonl")
    (folder / "finetune.jsonl").write_text(json.dumps(rows[1]) + "\n")
    base["evaluation"] = {
        "every": 500,
        "tasks": [
            {"name": "loss", "test": str(folder / "pairs.jsonl")},
            {
                "name": "nl_rx",
                "test": str(folder / "pairs.jsonl"),
                "validation": str(folder / "rows.jsonl"),
                "train": str(folder / "finetune.jsonl"),
                "finetune": {"epochs": 1},
            },
        ],
    }
    base["data"]["path"] = str(folder / "corpus_of_finetuned")
    (folder / "finetuned.yaml").write_text(yaml.safe_dump(base))
    metric = {"task": "nl_rx", "name": "exact"}
    path = write_study(name="finetuned", base="finetuned.yaml", metric=metric, tune=TUNE | {"extensions": 0})
    code, study = studies.start(path)
    (plan,) = json.loads((study / "study.json").read_text())["tune"]["plans"]
    assert code == 0 and plan["rows"]["dropped"] == {"tested": 1, "trained": 3}  # a row of the finetuning too
    trial = yaml.safe_load((study / "tuning" / "plain.learning_rate-0.001-seed7" / "config.yaml").read_text())
    (task,) = trial["evaluation"]["tasks"]
    assert task["finetune"]["epochs"] == 1 and not trial["evaluation"]["every"]


def test_a_failed_trial_blocks_the_comparison_until_its_extension_is_given_up(write_study, monkeypatch, caplog):
    studies = FakeStudies(monkeypatch)
    studies.rate_effect, studies.best_rate = 0.01, 0.016
    studies.failing = {"jepa.learning_rate-0.016-seed7"}
    code, study = studies.start(write_study(tune=TUNE, name="failing"))
    assert code == 1 and "tune.extensions below 1" in caplog.text
    with pytest.raises(UserError, match="the tuning is not finished, so there is nothing to compare yet"):
        read_comparison([study], None, None)
    path = write_study(tune=TUNE | {"extensions": 0}, name="failing")
    assert studies.start(path)[0] == 0 and studies.trained == ["plain-seed1", "jepa-seed1"]
    tune = json.loads((study / "study.json").read_text())["tune"]
    assert tune["best"]["jepa"] == {RATE: 4e-3} and tune["at_edge"]["jepa"] == [RATE]


def test_an_added_arm_may_not_change_the_best_values_of_compared_runs(write_study, monkeypatch):
    studies = FakeStudies(monkeypatch)
    studies.rate_effect, studies.best_rate = 0.01, 0.05
    arms = {"plain": {"objective.name": "next_token"}, "jepa": {}}
    rates = {"keys": {RATE: [1e-3, 2e-3, 4e-3]}, "seeds": [7], "extensions": 0}
    assert studies.start(write_study(arms=arms, tune=rates, name="added"))[0] == 0
    arms["other"] = {"objective.weight": 0.3}
    path = write_study(arms=arms, tune=rates | {"extensions": 1}, name="added")
    with pytest.raises(UserError, match=r"plain is best with .*0.008.*, but its runs were trained with .*0.004"):
        studies.start(path)
    code, study = studies.start(write_study(arms=arms, tune=rates, name="added"))
    assert code == 0 and studies.trained == ["other-seed1"]
    assert json.loads((study / "study.json").read_text())["tune"]["best"] == {arm: {RATE: 4e-3} for arm in arms}


def test_only_common_keys_are_extended_and_a_value_counts_once(write_study, monkeypatch):
    studies = FakeStudies(monkeypatch)
    studies.rate_effect, studies.best_rate = 0.01, 0.016
    weights = {"jepa": {"objective.weight": [0.1, 0.5]}}
    tune = TUNE | {"arms": weights, "equal": False}
    code, study = studies.start(write_study(tune=tune, name="keys", matched_by="seconds"))
    found = json.loads((study / "study.json").read_text())["tune"]
    assert code == 0 and found["extensions"] == [{RATE: [0.016]}]
    assert "objective.weight" in found["at_edge"]["jepa"] and len(found["trials"]["jepa"]) == 6
    assert json.loads((study / "tuning" / "study.json").read_text())["matched_by"] == "flops"
    tune["keys"] = {RATE: [1e-3, 4e-3, 0.016]}  # now listed too
    studies.start(write_study(tune=tune, name="keys", matched_by="seconds"))
    again = json.loads((study / "study.json").read_text())["tune"]
    assert again["trials"] == found["trials"] and not any("." in name for name in studies.trained)


def test_without_tune_the_arms_do_not_count_as_tuned(write_study, monkeypatch):
    studies = FakeStudies(monkeypatch)
    code, study = studies.start(write_study(tune=TUNE | {"extensions": 0}, name="was_tuned"))
    assert code == 0 and "The arms were tuned with 2 trials" in render_report(study, page=False)[0]
    best = json.loads((study / "study.json").read_text())["tune"]["best"]
    arms = {"plain": {"objective.name": "next_token"} | best["plain"], "jepa": best["jepa"]}
    assert studies.start(write_study(arms=arms, name="was_tuned"))[0] == 0 and studies.trained == []
    assert "The arms were not tuned" in render_report(study, page=False)[0]
    assert json.loads((study / "study.json").read_text())["tune"]["best"] == best


def test_an_extension_does_not_leave_the_valid_values(write_study, monkeypatch):
    studies = FakeStudies(monkeypatch)
    tune = {"keys": {"train.warmup_fraction": [0.9, 0.5]}, "seeds": [7]}
    code, study = studies.start(write_study(tune=tune, name="bounded"))
    found = json.loads((study / "study.json").read_text())["tune"]
    assert code == 0 and not found["extensions"] and found["at_edge"]["plain"] == ["train.warmup_fraction"]


def test_rows_of_the_corpus_of_any_arm_do_not_decide(write_rows_study, folder, monkeypatch):
    studies = FakeStudies(monkeypatch)
    sources = yaml.safe_load((folder / "base.yaml").read_text())["data"]["sources"]
    more = [*sources, {"type": "json", "path": str(folder / "rows.jsonl")}]
    arms = {"plain": {"objective.name": "next_token"}, "jepa": {}, "more": {"data.sources": more}}
    path, _ = write_rows_study("any_arm", arms=arms, tune=TUNE | {"extensions": 0})
    with pytest.raises(UserError, match="of the 5 rows of validation of loss, 1 are test rows and 5 are training"):
        studies.start(path)


def test_what_is_decided_after_scores_exist_is_reported(write_study, monkeypatch):
    studies = FakeStudies(monkeypatch)
    code, study = studies.start(write_study(name="decided", seeds=[1, 2]))
    decided = json.loads((study / "study.json").read_text())["decisions"]
    assert code == 0 and [entry["scored"] for entry in decided] == [0] and decided[0]["primary"] is None
    assert "Decided on" not in render_report(study, page=False)[0]
    studies.start(write_study(name="decided", seeds=[1, 2], primary="jepa"))
    assert [entry["scored"] for entry in json.loads((study / "study.json").read_text())["decisions"]] == [0, 4]
    text, page = render_report(study)
    for shown in (text, page):
        assert "when 4 runs had already been scored: primary jepa." in shown
    metric = {"task": "loss", "name": "lm", "higher_is_better": True}
    studies.start(write_study(name="decided", seeds=[2], primary="jepa", metric=metric))
    text, _ = render_report(study, page=False)
    assert "scored: metric loss/lm (higher is better), seeds 2." in text
    studies.start(write_study(name="decided", seeds=[11], primary="jepa", metric=metric))
    decision = json.loads((study / "study.json").read_text())["decisions"][-1]
    assert (decision["scored"], decision["seeds"]) == (4, [11]), "runs that are no longer listed count"
    arms = {"plain": {"objective.name": "next_token"}, "jepa": {}, "other": {"objective.weight": 0.3}}
    studies.start(write_study(name="decided", seeds=[11], primary="jepa", metric=metric, arms=arms))
    text, _ = render_report(study, page=False)
    assert "when 6 runs had already been scored: arms plain jepa other." in text


@pytest.mark.parametrize(("higher_is_better", "scale"), [(True, 1.0), (False, 1.0), (True, 100.0)])
def test_sensitivity_is_measured_along_a_key_at_the_best_values_of_other_keys(higher_is_better, scale):
    def trial(rate: float, weight: float, *scores: float) -> dict:
        return {
            "values": {"rate": rate, "weight": weight},
            "scores": {
                str(seed): scale * (score if higher_is_better else 1 - score) for seed, score in enumerate(scores)
            },
        }

    trials = [
        trial(4.0, 1.0, 0.80, 0.82),
        trial(1.0, 1.0, 0.78, 0.796),  # 0.022 below the best mean
        trial(2.0, 1.0, 0.79, 0.80),
        trial(8.0, 1.0, 0.80, 0.79),
        trial(16.0, 1.0, 0.81, 0.50),
        trial(4.0, 2.0, 0.99, 0.10),
    ]
    tune = {"trials": {"arm": trials}, "best": {"arm": {"rate": 4.0, "weight": 1.0}}, "at_edge": {"arm": ["weight"]}}
    comparison = Comparison("t", {}, None, Metric("task", "exact", higher_is_better), "", "flops", tune=tune)
    rate, weight = (found[0] for found in sensitivity(comparison).values())
    assert rate.values == [1.0, 2.0, 4.0, 8.0, 16.0] and rate.best == 4.0 and not rate.at_edge
    assert [rate.values[index] for index in rate.good] == [2.0, 4.0, 8.0] and rate.width == 4.0
    assert rate.spread == pytest.approx(scale * 0.0110, abs=scale * 2e-4)
    assert weight.values == [1.0, 2.0] and weight.width == 1.0 and weight.at_edge


def test_an_edge_of_a_range_with_zero_is_reported(write_study, monkeypatch):
    studies = FakeStudies(monkeypatch)
    tune = TUNE | {"keys": {"train.warmup_fraction": [0.0, 0.1]}, "extensions": 2}
    code, study = studies.start(write_study(tune=tune, name="zero"))
    found = json.loads((study / "study.json").read_text())["tune"]
    assert code == 0 and found["extensions"] == [] and found["at_edge"]["plain"] == ["train.warmup_fraction"]


def test_the_plan_is_recorded_before_the_first_trial_and_later_changes_name_the_scored_runs(write_study, monkeypatch):
    studies, plans = FakeStudies(monkeypatch), []
    train = studies.train

    def record_plans(*arguments):
        plans.append(json.loads((studies.folder / "study.json").read_text())["tune"]["plans"])
        return train(*arguments)

    monkeypatch.setattr(studies, "train", record_plans)
    path = write_study(tune=TUNE | {"extensions": 0}, name="planned")
    studies.folder = load_study(path, []).folder
    studies.start(path)
    assert [plan["scored"] for plan in plans[0]] == [0] and plans[0][0]["compared_seeds"] == [1]
    _, study = studies.start(write_study(tune=TUNE | {"extensions": 0}, name="planned", seeds=[2]))
    text, _ = render_report(study, page=False)
    assert "The plan of the tuning was changed 1 time(s)" in text
    assert "the last time when 6 runs had been scored." in text


def test_a_failed_check_of_the_trials_changes_no_plan(write_study, monkeypatch):
    studies = FakeStudies(monkeypatch)
    _, study = studies.start(write_study(tune=TUNE | {"extensions": 0}, name="checked"))
    before = (study / "study.json").read_text()
    config = study / "tuning" / "plain.learning_rate-0.001-seed7" / "config.yaml"
    config.write_text(config.read_text().replace("learning_rate: 0.001", "learning_rate: 0.003"))
    with pytest.raises(UserError, match="has changed since the run was started"):
        studies.start(write_study(tune=TUNE | {"extensions": 1}, name="checked"))
    assert (study / "study.json").read_text() == before


def test_trials_without_finite_scores_are_not_part_of_the_sensitivity():
    trials = [{"values": {"rate": rate}, "scores": {"1": score}} for rate, score in ((1, math.nan), (2, 0.7), (3, 0.6))]
    tune = {"trials": {"arm": trials}, "best": {"arm": {"rate": 2}}, "at_edge": {"arm": []}}
    (rate,) = sensitivity(Comparison("t", {}, None, Metric("task", "exact", True), "", "flops", tune=tune))["rate"]
    assert rate.values == [2.0, 3.0] and rate.best == 2.0


def test_sensitivity_to_texts_and_to_zero():
    def trial(optimizer: str, decay: float, score: float) -> dict:
        return {"values": {"optimizer": optimizer, "decay": decay}, "scores": {"1": score, "2": score}}

    trials = [
        trial("muon", 0.0, 0.80),
        trial("lion", 0.0, 0.70),
        trial("adamw", 0.0, 0.79),
        trial("muon", 0.1, 0.79),
        trial("muon", 0.2, 0.60),
    ]
    tune = {"trials": {"arm": trials}, "best": {"arm": trials[0]["values"]}, "at_edge": {"arm": []}}
    comparison = Comparison("t", {}, None, Metric("task", "exact", True), "", "flops", tune=tune)
    measured = sensitivity(comparison)
    optimizer, decay = (found[0] for found in measured.values())
    assert (optimizer.values, optimizer.best, optimizer.good) == (["muon", "lion", "adamw"], "muon", [0, 2])
    assert (decay.best, decay.good, optimizer.width, decay.width) == (0.0, [0, 1], None, None)
    assert [row[4:6] for row in sensitivity_rows(measured)] == [["muon, adamw", "–"], ["0 to 0.1", "–"]]
