"""The section of a report on overfitting, which compares arms after their lowest validation loss."""

import json
from pathlib import Path

from data_prep.utils.files import read_json_lines
from pretrain.run_folder import read_metrics
from tests.pretrain.report.report_helpers import assert_self_contained, parse_table, render_report


def write_json_lines(path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def set_validation_losses(folder, losses: dict[int, float]) -> None:
    """Set the validation loss at some steps in the metrics of a run."""
    lines = [
        line | ({"validation/loss/lm": losses[line["step"]]} if line["step"] in losses else {})
        for line in read_metrics(folder)
    ]
    write_json_lines(folder / "metrics.jsonl", lines)


PLAIN = {1: 0.70, 2: 0.69, 3: 0.71}
TITLE = "## Past the best validation loss"


def write_overfitting_arms(study_with_values) -> Path:
    """Write a study with an arm that overfits less than the baseline and one that overfits as much."""
    study = study_with_values(
        {"plain": PLAIN, "steady": {1: 0.70, 2: 0.70, 3: 0.705}, "alike": {1: 0.69, 2: 0.71, 3: 0.70}}
    )
    at_best = {
        "arm0": {"loss": 0.5, "exact": 0.8},
        "arm1": {"loss": 0.6, "exact": 0.71},
        "arm2": {"loss": 0.5, "exact": 0.8},
    }
    # validation loss of each seed at the last step
    at_end = {"arm0": (0.91, 0.92, 0.93), "arm1": (0.63, 0.66, 0.71), "arm2": (0.90, 0.89, 0.88)}
    for folder in study.glob("arm*"):
        arm, seed = folder.name.split("-")
        set_validation_losses(folder, {3: at_best[arm]["loss"], 6: at_end[arm][int(seed) - 1]})
        results = folder / "evaluation" / "results.jsonl"
        last = json.loads(results.read_text())
        before = last | {"step": 3, "metrics": {"exact": at_best[arm]["exact"]}}
        write_json_lines(results, [before, last])
    return study


def test_the_primary_arm_decides_whether_overfitting_of_other_arms_is_tested(study_with_values):
    study = write_overfitting_arms(study_with_values)
    description = json.loads((study / "study.json").read_text())
    for primary, is_tested in (("steady", True), ("alike", False)):
        (study / "study.json").write_text(json.dumps(description | {"primary": primary}))
        sentences = render_report(study, page=False)[0].partition(TITLE)[2]
        assert ("steady does better than plain in validation/loss/lm past" in sentences) == is_tested
        assert ("tested only if the primary arm, alike, differs" in sentences) != is_tested


def test_arms_are_compared_past_the_best_validation_loss(study_with_values):
    study = write_overfitting_arms(study_with_values)
    text, page = render_report(study)
    past = parse_table(text.partition(TITLE)[2])
    assert past["plain"]["lowest validation loss"].startswith("0.5000")
    assert past["plain"]["loss increase from there to the end"].startswith("0.4200")
    assert past["plain"]["total tokens / tokens up to that loss"] == "2.0"
    assert past["plain"]["metric change from there to the end"].startswith("−0.1000")
    sentences = text.partition(TITLE)[2]
    assert (
        "steady does better than plain in validation/loss/lm past the best validation loss: change of +0.0667 "
        "against +0.4200 (difference −0.3533 over 3 seeds, 95% interval"
    ) in sentences
    assert "alike: no difference from plain found in validation/loss/lm" in sentences
    assert (
        "steady does better than plain in nl_rx/exact past the best validation loss: change of −0.0083 against −0.1000"
        in sentences.replace("\\", "")
    )
    assert "Past the best validation loss" in page and "steady does better than plain" in page
    assert "Past the best" not in render_report(study_with_values({"plain": PLAIN, "other": PLAIN}), page=False)[0]
    assert_self_contained(page)


def test_a_rise_of_more_than_one_percent_counts_as_overfitting(study_with_values):
    study = study_with_values({"plain": PLAIN, "other": PLAIN})
    for rise, is_shown in ((1.009, False), (1.011, True)):
        for folder in study.glob("arm*"):
            set_validation_losses(folder, {3: 0.5, 6: 0.5 * rise})
        assert (TITLE in render_report(study, page=False)[0]) == is_shown


def test_the_metric_at_the_lowest_validation_loss_is_interpolated_or_missing(study_with_values):
    """The lowest loss is at step 3. The report needs evaluations before and after it, and one at the last step."""
    evaluated = {
        "arm0-1": {2: 0.2, 4: 0.4, 6: 0.7},
        "arm0-2": {4: 0.4, 6: 0.7},
        "arm1-1": {2: 0.2, 4: 0.4},
        "arm1-2": {6: 0.7},
    }
    study = study_with_values({"plain": {1: 0.7, 2: 0.7}, "other": {1: 0.7, 2: 0.7}})
    for folder in study.glob("arm*"):
        set_validation_losses(folder, {3: 0.5, 6: 0.9})
        results = folder / "evaluation" / "results.jsonl"
        result = read_json_lines(results)[0]
        values = evaluated[folder.name]
        write_json_lines(results, [result | {"step": step, "metrics": {"exact": values[step]}} for step in values])
    text, page = render_report(study)
    text = text.partition(TITLE)[2].replace("\\", "")
    table = parse_table(text)
    assert table["plain"]["metric at that loss, interpolated"] == "0.3000"
    assert table["plain"]["metric change from there to the end"] == "0.4000"
    assert (
        table["other"]["metric at that loss, interpolated"]
        == table["other"]["metric change from there to the end"]
        == "–"
    )
    for arm, seed in (("plain", 2), ("other", 1)):
        reason = "the metric needs evaluated checkpoints before and after"
        sentence = f"{arm}: seed {seed} is excluded from nl_rx/exact in this section: {reason}"
        assert sentence in text and sentence in page
    assert "is interpolated linearly between" in page and "nearest to the lowest validation loss" not in page
