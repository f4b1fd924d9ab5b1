"""An unfinished study has means, but no p value, interval or verdict. A pilot is not part of the test."""

import json
import re
import shutil

import pytest

from pretrain.report.arms import read_comparison
from pretrain.report.runs import read_run
from pretrain.report.summary import summarize
from tests.pretrain.report.report_helpers import parse_table, render_report
from tests.pretrain.report.test_overfitting import set_validation_losses
from tests.pretrain.report.tiny_study import change_lines

SEEDS = range(1, 7)
VALUES = {
    "plain": {seed: 0.5 + seed / 1000 for seed in SEEDS},
    "pairs": {seed: 0.7 + seed % 2 / 1000 for seed in SEEDS},
    "third": {seed: 0.4 - seed % 3 / 1000 for seed in SEEDS},
}
POWER = {"detect": 0.02, "pilot": [1, 2, 3], "most": 12, "arms": list(VALUES)}
DECISION = {
    "sd": {"pairs": 0.0123, "third": 0.01},
    "deciding": "pairs",
    "seeds": [4, 5, 6],
    "limit_reached": False,
    "detectable": 0.019,
}


def set_power(study, power):
    path = study / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"power": power}))


def remove_run(study):
    shutil.rmtree(study / "arm2-5")


def stop_run(study):
    (study / "arm2-5" / "status.json").write_text(json.dumps({"status": "failed", "step": 3, "reason": ""}))


def skip_evaluation(study):
    change_lines(study / "arm2-5" / "evaluation" / "results.jsonl", lambda line: line.update(step=3))


@pytest.mark.parametrize("change", [remove_run, stop_run, skip_evaluation])
def test_no_p_value_before_all_runs_are_finished(study_with_values, change):
    study = study_with_values(VALUES)
    for folder in study.glob("arm*"):  # these losses rise, so there is a section on overfitting, which has tests too
        set_validation_losses(folder, {3: 0.5, 6: 0.9 + read_run(folder).seed / 100 + int(folder.name[3]) / 10})
    finished = render_report(study)
    assert all("p &lt; " in text or "p < " in text or "p = " in text for text in finished)
    change(study)
    text, page = render_report(study)
    assert "**No verdict yet: 1 of 18 runs is missing.**" in text and "No verdict yet: 1 of 18 runs is missing." in page
    assert "remove its seed from" in text and "remove its seed from" in page
    rows = parse_table(text)
    for arm in ("pairs", "third"):
        assert rows[arm]["p"] == rows[arm]["95% interval"] == "–" and rows[arm]["verdict"] == "no verdict"
    assert rows["pairs"]["difference from plain"] == "+0.1970" and rows["pairs"]["nl_rx/exact"] == "0.7005 ± 0.0005"
    assert "Past the best validation loss" in text
    for shown in (text, page.partition("<body>")[2].partition("<h2>How each number")[0]):
        assert not re.search(r"p (=|<|&lt;) |95% interval [+−\d]|\bhelps\b|\bhurts\b|does (better|worse)", shown)


def test_run_directories_of_an_unfinished_study_have_no_p_value_either(study_with_values):
    study = study_with_values(VALUES)
    run_dirs = [study / f"arm{arm}-{seed}" for arm in (0, 1) for seed in (1, 2, 3, 4)]
    assert all(test.p for test in summarize(read_comparison(run_dirs, None, None)).tests.values())
    remove_run(study)
    comparison = read_comparison(run_dirs, None, None)
    assert comparison.pending == f"1 of 18 runs is missing in {study}, the study of these runs"
    assert [test.verdict for test in summarize(comparison).tests.values()] == ["no verdict"]


def test_a_pilot_is_not_named_if_the_study_lists_other_seeds_by_now(study_with_values):
    study = study_with_values(VALUES)
    for seeds in ([4, 5], [7, 8, 9]):
        set_power(study, POWER | DECISION | {"seeds": seeds})
        text, _ = render_report(study, page=False)
        assert "follows from a pilot" not in text and parse_table(text)["pairs"]["seeds"] == "6 of 6"


def test_the_pilot_stays_excluded_if_the_study_lists_fewer_seeds(study_with_values):
    study = study_with_values(VALUES)
    set_power(study, POWER | DECISION | {"seeds": [4, 5, 6, 7]})
    text, _ = render_report(study, page=False)
    assert "The study file now lists 3 of the 4 seeds" in text and parse_table(text)["pairs"]["seeds"] == "3 of 3"


def test_a_seed_that_was_removed_from_the_study_does_not_block_the_verdict(study_with_values):
    study = study_with_values(VALUES)
    remove_run(study)
    contents = json.loads((study / "study.json").read_text())
    for arm in contents["arms"].values():
        del arm["runs"]["5"]
    (study / "study.json").write_text(json.dumps(contents))
    text, _ = render_report(study, page=False)
    assert parse_table(text)["pairs"]["verdict"] == "helps" and parse_table(text)["pairs"]["seeds"] == "5 of 5"


def test_the_seeds_of_a_pilot_are_not_compared(study_with_values):
    study = study_with_values(VALUES)
    set_power(study, POWER | DECISION)
    text, page = render_report(study)
    alone = study_with_values({arm: {seed: by_seed[seed] for seed in (4, 5, 6)} for arm, by_seed in VALUES.items()})
    assert parse_table(text) == parse_table(render_report(alone, page=False)[0])
    for shown in (text.replace("\\", ""), page):
        assert "The number of seeds, 3, follows from a pilot. Its seeds 1, 2, 3 are excluded" in shown
        assert "was 0.0123 (pairs)" in shown and "3 seeds find a true difference of 0.0200" in shown
    set_power(study, POWER | DECISION | {"limit_reached": True, "detectable": 0.05})
    text, _ = render_report(study, page=False)
    assert "allows at most 3 seeds. They find a true difference of 0.0500" in text


def test_a_pilot_alone_has_no_verdict(study_with_values):
    study = study_with_values({arm: {seed: by_seed[seed] for seed in (1, 2, 3)} for arm, by_seed in VALUES.items()})
    set_power(study, POWER)
    text, _ = render_report(study, page=False)
    assert "No verdict yet: the number of seeds follows from the pilot, of which 0 of 9 runs are missing" in text
    assert parse_table(text)["pairs"]["p"] == "–" and parse_table(text)["pairs"]["nl_rx/exact"].startswith("0.70")
