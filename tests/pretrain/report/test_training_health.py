"""The section of a report on the health of the training, which shows the measures in which arms differ."""

from pathlib import Path

import pytest

from pretrain.report.health import clipped_fraction
from pretrain.report.runs import Run, read_run
from tests.pretrain.report.report_helpers import assert_self_contained, parse_table, render_report
from tests.pretrain.report.tiny_study import change_lines

ARMS = {"plain": {1: 0.70, 2: 0.69}, "other": {1: 0.70, 2: 0.69}}
TITLE = "Health of the training"


@pytest.fixture
def measured_study(study_with_values):
    """Return a function that makes a study whose runs have measurements, {run: {step: values}}."""

    def make(measured: dict[str, dict[int, dict]], arms=ARMS):
        study = study_with_values(arms)
        for path in study.glob("arm*/metrics.jsonl"):
            values = measured.get(path.parent.name, {})

            def change(line: dict, values=values) -> None:
                line.pop("optimizer/clipped_fraction")
                line.update(values.get(line["step"], {}))

            change_lines(path, change)
        return study

    return make


def test_a_branch_counts_clipped_steps_from_its_source_on():
    lines = [{"step": step, "optimizer/clipped_fraction": float(step == 310)} for step in range(310, 401, 10)]
    branch = Run(Path("branch"), {}, {"lineage": [{"step": 100}, {"step": 300}]}, {}, lines, [])
    assert clipped_fraction(branch) == pytest.approx(0.1)


def measurement(scale: float, log_z: float = 6.0) -> dict:
    return {
        "layers/gradient_norm": {"embedding": 9.0, "1": scale, "2": 3 * scale, "norm": None},
        "layers/activation_rms": {"embedding": 0.1, "1": 1.0, "2": 2.0},
        "logits/rms": scale,
        "logits/log_z": log_z,
    }


def test_measures_in_which_arms_differ_are_in_a_table_and_in_charts(measured_study):
    # the first measurement is in the first half of the run, so it does not count
    study = measured_study(
        {
            f"arm{arm}-{seed}": {
                2: measurement(70.0),
                4: measurement(scale + seed / 10, log_z=6.0 + seed),
                6: measurement(scale + seed / 10, log_z=6.0 + seed),
            }
            for arm, scale in enumerate((1.0, 2.0))
            for seed in (1, 2)
        }
    )
    text, page = render_report(study)
    table = parse_table(text.partition(f"## {TITLE}")[2])
    assert set(table) == {"largest gradient norm of a layer", "logit RMS"}, "log Z and activations do not differ"
    assert table["logit RMS"]["plain"] == "1.1500 ± 0.0707" and table["logit RMS"]["other"].startswith("2.1500")
    assert table["largest gradient norm of a layer"]["plain"].startswith("3.4500")
    words = " ".join(assert_self_contained(page).text)
    assert f"<h2>{TITLE}</h2>" in page and "gradient of each layer" in words and "output of each layer" not in words


def test_clipped_steps_are_weighted_by_the_steps_of_their_intervals(measured_study):
    fractions = {1: 1.0, 3: 0.5, 6: 0.0}
    study = measured_study(
        {
            f"arm0-{seed}": {step: {"optimizer/clipped_fraction": value} for step, value in fractions.items()}
            for seed in (1, 2)
        }
        | {f"arm1-{seed}": {6: {"optimizer/clipped_fraction": 0.0}} for seed in (1, 2)}
    )
    assert clipped_fraction(read_run(study / "arm0-1")) == pytest.approx((1 * 1.0 + 2 * 0.5) / 6)
    text, page = render_report(study)
    row = parse_table(text.partition(f"## {TITLE}")[2])["fraction of clipped steps"]
    assert row["plain"].startswith("0.3333") and row["other"].startswith("0.0000") and "clipped steps" in page


def test_equal_arms_differ_in_nothing(measured_study):
    study = measured_study({f"arm{arm}-{seed}": {6: measurement(1.0)} for arm in (0, 1) for seed in (1, 2)})
    text, page = render_report(study)
    section = text.partition(f"## {TITLE}")[2]
    assert section.split("##")[0].strip() == "The seeds of the arms overlap in all measures that were recorded."
    assert "gradient of each layer" not in page


def test_without_measurements_or_with_one_arm_there_is_no_section(measured_study):
    text, page = render_report(measured_study({}))
    assert TITLE not in text and TITLE not in page
    alone = measured_study({"arm0-1": {6: measurement(1.0)}}) / "arm0-1"
    assert "No verdict: there is only one arm" in (text := render_report(alone, page=False)[0]) and TITLE not in text


def test_values_that_were_not_finite_are_skipped():
    lines = [{"step": 1, "layers/gradient_norm": {"1": None, "2": 2.0}}, {"step": 2}]
    assert Run(None, {}, {}, {}, lines, []).layer_curves("layers/gradient_norm") == {"2": [(1, 2.0)]}
