"""Executors of the preparation: processes of this machine, or the ranks of an MPI job.

An executor runs all tasks of a phase before the next phase. A task calls a module-level function with plain
arguments. It writes its results atomically, so any process may run any task, and a finished task is never repeated. It
returns the number of records that it processed. After a task that raises UserError, the remaining tasks still run;
after an OSError, they do not.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from data_prep.phase_progress import PhaseProgress
from data_prep.utils.console import INTERRUPTED_EXIT_CODE, UserError

Result = TypeVar("Result")
Failure = UserError | OSError
"""Errors that a task may raise. After an OSError, most likely a full disk, no further task is started."""


ABORT_GRACE_SECONDS = 0.5
"""Time that the launcher gets to forward the output of a rank before all ranks are aborted, in seconds."""
POLL_SECONDS = 0.02
"""Interval between checks for an MPI message, in seconds. MPI's own wait functions would keep a core busy."""


class Task(NamedTuple):
    """One call of a phase's function."""

    arguments: tuple[Any, ...]
    size: int
    """Bytes of input, for the progress display."""


class Executor(Protocol):
    """Processes that prepare one corpus together."""

    is_main: bool
    description: str

    def run_on_main(self, action: Callable[[], Result]) -> Result:
        """Run `action` in the main process only. Every process returns its result, or raises its error."""

    def run_on_all(self, action: Callable[[], Result]) -> Result:
        """Run `action` in every process. If any process fails, all of them raise its error."""

    def run(self, function: Callable[..., int], tasks: Sequence[Task], progress: PhaseProgress) -> None:
        """Run all tasks, and finally raise the first UserError, if any."""

    def close(self) -> None:
        """Release the processes."""


class LocalExecutor:
    """An executor with worker processes on this machine, started when there is more than one task."""

    is_main = True

    def __init__(self, workers: int | None):
        self.workers = workers or len(os.sched_getaffinity(0))
        self.description = "1 process" if self.workers == 1 else f"{self.workers} processes"
        self.pool: ProcessPoolExecutor | None = None

    def run_on_main(self, action: Callable[[], Result]) -> Result:
        """Run `action`: there is only one process."""
        return action()

    run_on_all = run_on_main

    def run(self, function: Callable[..., int], tasks: Sequence[Task], progress: PhaseProgress) -> None:
        """Run all tasks in worker processes, and finally raise the first UserError, if any."""
        errors: dict[int, UserError] = {}
        try:
            with progress:
                for number, outcome in self._outcomes(function, tasks):
                    records = 0
                    try:
                        records = outcome()
                    except UserError as error:
                        errors[number] = error
                    progress.add(tasks[number].size, records)
        except BrokenProcessPool:
            raise UserError(
                "a worker process of the preparation was killed (out of memory?); "
                "run the same command again, or set a smaller data.workers"
            ) from None
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():  # the next run repeats their tasks
                worker.terminate()
            raise
        _raise_first(errors)

    def _outcomes(self, function: Callable[..., int], tasks: Sequence[Task]) -> Iterator[tuple[int, Callable[[], int]]]:
        """Yield the number of each completed task, and a function that returns its result or raises its error."""
        if min(self.workers, len(tasks)) <= 1:
            for number, task in enumerate(tasks):
                yield number, partial(function, *task.arguments)
            return
        if self.pool is None:
            # With forkserver the workers start from a clean process that has already imported all modules they need.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["data_prep.encode"])
            self.pool = ProcessPoolExecutor(self.workers, context, initializer=end_with_parent)
        running = {self.pool.submit(function, *task.arguments): number for number, task in enumerate(tasks)}
        for completed in as_completed(running):
            yield running[completed], completed.result

    def close(self) -> None:
        """Stop the worker processes."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """End this worker when its parent process ends, and ignore Ctrl-C, which the parent handles.

    An orphaned worker would continue to write without the lock, and then wait forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait_for_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # this is a worker
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


class MpiExecutor:
    """An executor with the ranks of an MPI job, which share a file system. Rank r runs the tasks r, r + ranks, ..."""

    def __init__(self, communicator: Any):
        self.communicator = communicator
        self.rank, self.ranks = communicator.Get_rank(), communicator.Get_size()
        self.is_main = self.rank == 0
        self.description = f"{self.ranks} MPI ranks"

    def run_on_main(self, action: Callable[[], Result]) -> Result:
        """Run `action` on rank 0. Every rank returns its result, or raises its error."""
        outcome = self._outcome(action) if self.is_main else None
        result: Result = self._share(outcome)
        return result

    def run_on_all(self, action: Callable[[], Result]) -> Result:
        """Run `action` on every rank; raise the first error on all of them."""
        result: Result
        result, error = self._outcome(action)
        if self.is_main:
            errors = [error, *(self._receive(rank) for rank in range(1, self.ranks))]
        else:
            self.communicator.send(error, 0)
        self._share((None, next((error for error in errors if error), None)) if self.is_main else None)
        return result

    def run(self, function: Callable[..., int], tasks: Sequence[Task], progress: PhaseProgress) -> None:
        """Run all tasks on all ranks, and finally raise the first UserError, if any."""
        errors: dict[int, Failure] = {}
        finished = 0

        def add_result(number: int, records: int, error: Failure | None) -> None:
            nonlocal finished
            finished += 1
            progress.add(tasks[number].size, records)
            if error:
                errors[number] = error

        with progress if self.is_main else nullcontext():
            os_error = None
            for number in range(self.rank, len(tasks), self.ranks):
                if os_error is None:
                    records, error = self._outcome(partial(function, *tasks[number].arguments))
                else:
                    records, error = 0, os_error
                os_error = error if isinstance(error, OSError) else None
                if not self.is_main:
                    self.communicator.send((number, records or 0, error), 0)
                    continue
                add_result(number, records or 0, error)
                while self.communicator.iprobe():
                    add_result(*self.communicator.recv())
            while self.is_main and finished < len(tasks):
                add_result(*self._receive())
        self.run_on_main(lambda: _raise_first(errors))

    def close(self) -> None:
        """Do nothing: the launcher ends the ranks."""

    def abort_on_error(self, main: Callable[[], None]) -> None:
        """Run `main` on every rank.

        All ranks raise a UserError, and the main rank reports it. Any other error aborts all ranks, because the peers
        would wait for this rank forever.
        """
        try:
            main()
        except SystemExit:
            raise
        except UserError:
            if self.is_main:
                raise
            sys.exit(2)
        except KeyboardInterrupt:
            self.communicator.Abort(INTERRUPTED_EXIT_CODE)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            time.sleep(ABORT_GRACE_SECONDS)
            self.communicator.Abort(1)

    @staticmethod
    def _outcome(action: Callable[[], Result]) -> tuple[Any, Failure | None]:
        try:
            return action(), None
        except (UserError, OSError) as error:
            return None, error

    def _share(self, outcome: tuple[Any, Failure | None] | None) -> Any:
        """Return the result of rank 0 on every rank, or raise its error."""
        if self.is_main:
            for rank in range(1, self.ranks):
                self.communicator.send(outcome, rank)
        else:
            outcome = self._receive(0)
        assert outcome is not None
        result, error = outcome
        if error:
            raise error
        return result

    def _receive(self, rank: int | None = None) -> Any:
        source = {} if rank is None else {"source": rank}
        while not self.communicator.iprobe(**source):
            time.sleep(POLL_SECONDS)
        return self.communicator.recv(**source)


def _raise_first(errors: Mapping[int, Failure]) -> None:
    if not errors:
        return
    first = errors[min(errors)]
    if isinstance(first, OSError):
        raise first
    others = len(errors) - 1
    note = ""
    if others:
        units = "units" if others > 1 else "unit"
        note = f" ({others:,} more {units} failed)"
    raise UserError(f"{first}{note}") from None
