"""The output of the loader benchmark."""

import json

import pytest

from tests.commands import ROOT, run_command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result():
    completed = run_command(
        ["python", str(ROOT / "benchmarks" / "loader.py"), "--rounds", "1", "--tokens", "200000", "--demo-steps", "0"]
    )
    return json.loads(completed.stdout)


def test_rates_are_reported_with_their_ratio_to_a_plain_read(result):
    assert result["records"].keys() == {"500", "26"}
    for name, rates in result["records"].items():
        assert rates["tokens_per_second"]["median"] == pytest.approx(int(name) * rates["records_per_second"], rel=0.01)
        assert 0 < rates["of_plain_read"]["median"] < 1
        assert rates["bytes_per_second"] > 2 * rates["tokens_per_second"]["median"]


def test_startup_on_a_billion_records_is_within_its_memory_limit(result):
    start = result["start_up_of_a_billion_records"]
    assert start["records"] == 10**9 and start["shards"] == 10_000
    assert 0 < start["bytes"] <= start["bytes_with_the_first_step"] < 300e6
    assert {"measured", "at_most", "met"} == set(result["targets"]["start-up seconds"])
