"""The scaling model of a step on many GPUs: its formulas, the links that it reads, and the error for a missing link."""

import json

import pytest

from benchmarks.scaling_model import RANKS, Cluster, Link, Work, fit_link, read_doctor_links, step_seconds
from data_prep.utils.console import UserError
from tests.commands import run_command, tiny_config, write_config
from tests.processes import TIMEOUT

WORK = Work(compute_seconds=1.0, micro_steps=2, tokens=1000, gathered=9e9, tensors=10, small=1e9, bucket=1e9)
FAST, SLOW = Link(1e11, 1e-6), Link(1e10, 1e-5)


def test_the_time_of_a_ring_is_set_by_its_slowest_link_and_its_number_of_hops():
    cluster = Cluster(FAST, SLOW, ranks_per_node=8)
    assert cluster.collective_seconds(1e10, 1, 1) == 0
    assert cluster.collective_seconds(1e10, 1, 8) == pytest.approx(7 / 8 * 0.1 + 7e-6)
    assert cluster.collective_seconds(1e10, 5, 16) == pytest.approx(15 / 16 * 1.0 + 5 * (14 * 1e-6 + 1e-5))
    assert Cluster(FAST, SLOW, 8, tree=True).collective_seconds(1e10, 1, 64) == pytest.approx(
        63 / 64 * 1.0 + 3e-6 + 3e-5
    )


def test_communication_volume_of_the_zero_stages():
    """The expected volumes of a step are in units of the bytes of the parameters.

    Stages 0 and 1: 2. Stage 2: 1 per micro step, plus 1. Stage 3: 3 per micro step, of which 2 exclude the small
    parameters, plus the small parameters once.
    """
    cluster = Cluster(Link(1e10, 0), None, 2)
    half = 0.5
    volumes = [step_seconds(WORK, stage, 2, cluster, overlap=0)["communication_seconds"] / half for stage in range(4)]
    assert volumes == pytest.approx([2, 2, 3, 2 * (2 * 0.9 + 1) + 0.1])
    overlapped = step_seconds(WORK, 3, 2, cluster, overlap=1)
    assert overlapped["exposed_seconds"] == pytest.approx(max(0, volumes[3] * half - 2))
    assert overlapped["efficiency"] == pytest.approx(2 / overlapped["seconds"])


@pytest.mark.parametrize("nodes", [1, 2])
def test_links_are_recovered_from_the_measurements_of_the_doctor(tmp_path, nodes):
    ranks, link = 4, Link(2e9, 3e-5)
    sizes = [1 << power for power in range(12, 28, 4)]
    collective_seconds = Cluster(link, None, ranks).collective_seconds
    reduced = [{"bytes": size, "ranks": ranks, "seconds": 2 * collective_seconds(size, 1, ranks)} for size in sizes]
    report = {
        "measurements": {"all_reduce": reduced, "pairs": []},
        "nodes": [{"name": str(node), "slots": ranks // nodes} for node in range(nodes)],
    }
    (tmp_path / "doctor.json").write_text(json.dumps(report))
    within, between, per_node = read_doctor_links(tmp_path / "doctor.json")
    assert per_node == ranks // nodes and (between is None) == (nodes == 1)
    assert (within.bandwidth, within.latency) == pytest.approx((link.bandwidth, link.latency))
    (tmp_path / "doctor.json").write_text("{}")
    with pytest.raises(UserError, match="not the output of `launcher/doctor"):
        read_doctor_links(tmp_path / "doctor.json")


def test_a_fitted_latency_is_never_negative():
    assert fit_link([(1e6, 1e-4), (1e8, 2e-2)], 2).latency == 0


@pytest.mark.slow
def test_the_command_prints_every_number_of_ranks_and_names_a_missing_link(tmp_path):
    config = write_config(tmp_path, tiny_config(tmp_path))
    command = ["python", "benchmarks/scaling_model.py", str(config), "--flops", "1e10", "--within", "1e9", "1e-5"]
    result = json.loads(run_command([*command, "--between", "1e8", "1e-4"]).stdout)
    assert [entry["ranks"] for entry in result["by_ranks"]] == list(RANKS) and "model" in result["kind"]
    efficiencies = [entry["stages"]["3"]["efficiency"] for entry in result["by_ranks"]]
    assert efficiencies[0] == 1 and efficiencies == sorted(efficiencies, reverse=True)
    completed = run_command(command, check=False)
    assert completed.returncode == 2
    assert completed.stderr.splitlines() == [
        "error: 64 ranks use the link between nodes, but its speed is unknown: set --between BYTES_PER_SECOND SECONDS"
    ]


@pytest.mark.slow
def test_the_check_measures_and_predicts():
    result = json.loads(run_command(["python", "benchmarks/scaling_model.py", "--check"], timeout=2 * TIMEOUT).stdout)
    assert all(seconds > 0 for seconds in result["measured_step_seconds"].values())
    assert all(0.2 < stage["predicted_over_measured"] < 5 for stage in result["predicted_2_processes"].values())
