"""The output of the preparation benchmark."""

import json

import pytest

from tests.commands import ROOT, run_command


def test_the_speed_of_preparation_is_reported_with_its_ratio_to_pure_tokenization():
    completed = run_command(["python", str(ROOT / "benchmarks" / "prepare.py"), "--megabytes", "1", "--rounds", "1"])
    result = json.loads(completed.stdout)
    assert 1 <= result["text_megabytes"] < 1.2 and result["records"] > 500 and result["rounds"] == 1
    assert result["megabytes_per_second"].keys() == {"raw_1", "prepare_1", "raw_2", "prepare_2"}
    rates = result["megabytes_per_second"]
    for workers in ("1", "2"):
        ratio = result["prepare_over_raw_times_workers"][workers]
        assert (
            0 < ratio == pytest.approx(rates[f"prepare_{workers}"] / rates["raw_1"] / int(workers), rel=0.01, abs=0.001)
        )
    assert {target["met"] for target in result["targets"].values()} <= {True, False}
