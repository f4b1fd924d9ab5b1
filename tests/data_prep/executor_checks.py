"""Checks that test_executor.py runs on two ranks under mpirun: `executor_checks.py FOLDER CHECK`."""

import sys
from pathlib import Path

from data_prep import executor as executor_module
from data_prep.executor import MpiExecutor, Task
from data_prep.phase_progress import PhaseProgress
from data_prep.utils.console import UserError, exit_on_user_error
from data_prep.utils.launch_env import find_mpi

FOLDER = Path(sys.argv[1])
executor_module.ABORT_GRACE_SECONDS = 3.0  # enough for a busy launcher to forward the output of a rank


def work_or_fail(number: int) -> int:
    if number in (3, 5):
        raise UserError(f"unit {number} is bad")
    (FOLDER / f"{number}").write_text(str(executor.rank))
    return 10


def write_to_full_disk(number: int) -> int:
    (FOLDER / f"{number}").touch()
    raise OSError(28, "No space left on device", "shard")


def run(function, count: int) -> PhaseProgress:
    progress = PhaseProgress("working", count)
    executor.run(function, [Task((number,), 1) for number in range(count)], progress)
    return progress


def succeed() -> None:
    progress = run(work_or_fail, 3)
    if executor.is_main:
        assert (progress.done, progress.records) == (3, 30)
    assert executor.run_on_main(lambda: f"from {executor.rank}") == "from 0"
    assert executor.run_on_all(lambda: executor.rank) == executor.rank
    run(work_or_fail, 0)


def fail_on_one_rank() -> None:
    def fail() -> None:
        if executor.rank == 1:
            raise UserError("rank 1 sees no file")

    executor.run_on_all(fail)


def crash() -> None:
    if executor.rank == 1:
        raise ZeroDivisionError("a bug on rank 1")
    executor.run_on_main(lambda: None)
    executor.run_on_all(lambda: None)  # waits for rank 1 forever unless its crash ends this rank


CHECKS = {
    "success": succeed,
    "failing_units": lambda: run(work_or_fail, 8),
    "full_disk": lambda: run(write_to_full_disk, 8),
    "error_on_one_rank": fail_on_one_rank,
    "crash": crash,
}

if __name__ == "__main__":
    executor = MpiExecutor(find_mpi())
    assert executor.ranks == 2
    exit_on_user_error(lambda: executor.abort_on_error(CHECKS[sys.argv[2]]))
