"""Executors under a real mpirun share results and errors, and no rank waits for a dead rank."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.executor import LocalExecutor, Task
from data_prep.phase_progress import PhaseProgress
from data_prep.utils.console import UserError
from tests.data_prep.conftest import MPIRUN, needs_mpi
from tests.processes import TIMEOUT

REPO_ROOT = Path(__file__).resolve().parents[2]


def run_two_ranks(folder: Path, check: str) -> subprocess.CompletedProcess:
    command = [MPIRUN, "-n", "2", sys.executable, Path(__file__).with_name("executor_checks.py"), folder, check]
    return subprocess.run(
        list(map(str, command)),
        env=os.environ | {"PYTHONPATH": str(REPO_ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@needs_mpi
def test_ranks_share_tasks_and_results(tmp_path):
    done = run_two_ranks(tmp_path, "success")
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "0", "1": "1", "2": "0"}


@needs_mpi
def test_a_failing_unit_is_reported_in_one_line_and_the_other_units_complete(tmp_path):
    done = run_two_ranks(tmp_path, "failing_units")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [
        "error: unit 3 is bad (1 more unit failed)"
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2", "4", "6", "7"}


@needs_mpi
def test_a_full_disk_stops_all_ranks_before_their_next_task(tmp_path):
    done = run_two_ranks(tmp_path, "full_disk")
    assert done.returncode != 0 and "No space left on device" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


@needs_mpi
def test_an_error_of_one_rank_stops_all_ranks(tmp_path):
    done = run_two_ranks(tmp_path, "error_on_one_rank")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == ["error: rank 1 sees no file"]


@needs_mpi
def test_a_crash_of_one_rank_ends_its_peers(tmp_path):
    done = run_two_ranks(tmp_path, "crash")
    assert done.returncode != 0 and "a bug on rank 1" in done.stderr


def test_processes_unknown_to_mpi_are_detected(command, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("name: x")
    arguments, environment = command(config)
    done = subprocess.run(
        arguments, env=environment | {"SLURM_STEP_NUM_TASKS": "2"}, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 2 and "2 processes were started together, but MPI sees 1" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def fail_at_odd_numbers(number: int) -> int:
    if number % 2:
        raise UserError(f"unit {number} is bad")
    return 1


@pytest.mark.parametrize("workers", [1, 2])
def test_local_workers_complete_the_other_units_after_an_error(workers):
    progress = PhaseProgress("working", 7)
    executor = LocalExecutor(workers)
    with pytest.raises(UserError, match=r"unit 1 is bad \(2 more units failed\)"):
        executor.run(fail_at_odd_numbers, [Task((number,), 1) for number in range(7)], progress)
    executor.close()
    assert (progress.done, progress.records) == (7, 4)


def test_a_log_line_shows_progress_and_the_time_left(monkeypatch, messages):
    monkeypatch.setattr(PhaseProgress, "LINE_SECONDS", 0)
    progress = PhaseProgress("tokenizing", 4_000_000)
    progress.started -= 10
    with progress:
        progress.add(1_000_000, 500)
        progress.add(3_000_000, 500)
    assert len(messages) == 1 and re.fullmatch(r"tokenizing: 25%, \d+ records/s, 0.1 MB/s, 3\ds left", messages[0])
