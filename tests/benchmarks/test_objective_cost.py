"""The output of the objective cost benchmark, whose implementations must all compute the same losses."""

import json
import math

import pytest

from tests.commands import ROOT, run_command

pytestmark = pytest.mark.slow

PACKED = [
    "next_token_packed",
    "joint_packed",
    "joint_dropout_0.75",
    "joint_active_0.25",
    "in_context_packed",
    "in_context_k0_packed",
    "regularized_packed",
    "nitp_packed",
    "nextlat_packed",
    "nextlat_kl_packed",
    "next_token_independent_packed",
    "independent_packed",
]
SEPARATE = ["two_passes_additive_mask", "three_passes_longest", "three_passes_512"]
RECORDS = 12


@pytest.fixture(scope="module")
def result():
    completed = run_command(
        [
            "python",
            str(ROOT / "benchmarks" / "objective_cost.py"),
            "--rounds",
            "1",
            "--steps",
            "1",
            "--records",
            str(RECORDS),
        ]
    )
    return json.loads(completed.stdout)


def test_every_implementation_reports_its_figures(result):
    assert result["ranks"] == 2 and result["threads_per_rank"] == 1 and result["records_per_step"] == RECORDS
    assert list(result["arms"]) == PACKED + SEPARATE
    for name, arm in result["arms"].items():
        assert arm["records_per_second"] > 0 and arm["peak_memory_bytes"] > 0, name
        assert arm["slots_per_record"] >= arm["positions_per_record"] > 0, name
        for ratio in ("records_per_second", "time", "time_over_positions", "time_over_flops", "time_over_slots"):
            spread = arm["to_baseline"][ratio]
            assert 0 < spread["min"] <= spread["median"] <= spread["max"], name
    assert result["arms"]["next_token_packed"]["to_baseline"]["positions"] == 1.0
    assert result["arms"]["three_passes_512"]["slots_per_record"] == 3 * 512
    assert set(result["records_per_second_of_joint_packed_over"]) == set(SEPARATE)
    assert len(result["targets"]) == 13
    assert all({"measured", "met"} < set(target) for target in result["targets"].values())


def test_every_implementation_uses_the_same_records(result):
    assert {arm["records"]["count"] for arm in result["arms"].values()} == {RECORDS}
    assert len({arm["records"]["sha256"] for arm in result["arms"].values()}) == 1


def test_every_implementation_computes_the_same_losses(result):
    losses = {name: arm["losses_at_start"] for name, arm in result["arms"].items()}
    # The independent layout makes two documents of each record, so its text and its next-token loss differ.
    independent = {"next_token_independent_packed", "independent_packed"}
    for group in (independent, set(losses) - independent):
        lm = [losses[name]["lm"] for name in group]
        assert max(lm) - min(lm) < 1e-4 and not math.isnan(lm[0])
    in_context = [losses[name]["jepa"] for name in ("in_context_packed", "in_context_k0_packed")]
    assert len({losses["joint_packed"]["jepa"], *in_context}) == 3
    assert losses["regularized_packed"].keys() == {"lm", "coding_rate"}
    jepa = [losses[name]["jepa"] for name in ["joint_packed", *SEPARATE]]
    assert max(jepa) - min(jepa) < 1e-4 and 0.01 < jepa[0] < 1.99
