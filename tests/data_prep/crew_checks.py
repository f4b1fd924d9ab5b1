"""Run by mpirun from test_crew.py: what the ranks of a crew agree on. `crew_checks.py FOLDER CHECK`."""

import sys
from pathlib import Path

from data_prep import crew as crews
from data_prep.console import UserError, exit_on_user_error
from data_prep.crew import Mpi, Task
from data_prep.launched import find_mpi
from data_prep.progress import Progress

FOLDER = Path(sys.argv[1])
crews.TOLD = 3.0  # a launcher that is held up has to pass on what a rank said


def work(number: int) -> int:
    if number in (3, 5):
        raise UserError(f"unit {number} is bad")
    (FOLDER / f"{number}").write_text(str(crew.rank))
    return 10


def full(number: int) -> int:
    (FOLDER / f"{number}").touch()
    raise OSError(28, "No space left on device", "shard")


def run(function, count: int) -> Progress:
    progress = Progress("working", count, print)
    crew.run(function, [Task((number,), 1) for number in range(count)], progress)
    return progress


def good() -> None:
    progress = run(work, 3)
    if crew.is_main:
        assert (progress.done, progress.records) == (3, 30)
    assert crew.once(lambda: f"from {crew.rank}") == "from 0"
    assert crew.everywhere(lambda: crew.rank) == crew.rank
    run(work, 0)


def of_one_rank() -> None:
    def fail() -> None:
        if crew.rank == 1:
            raise UserError("rank 1 sees no file")
    crew.everywhere(fail)


def crash() -> None:
    if crew.rank == 1:
        raise ZeroDivisionError("a mistake of ours")
    crew.once(lambda: None)
    crew.everywhere(lambda: None)  # would wait for rank 1 forever


CHECKS = {"good": good, "bad": lambda: run(work, 8), "full": lambda: run(full, 8), "of_one_rank": of_one_rank, "crash": crash}

if __name__ == "__main__":
    crew = Mpi(find_mpi())
    assert crew.ranks == 2
    exit_on_user_error(lambda: crew.guard(CHECKS[sys.argv[2]]))
