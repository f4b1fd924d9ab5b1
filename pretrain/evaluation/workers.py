"""Multi-process evaluation: rank 0 evaluates, and all ranks share the rows of slow steps, with one GPU per rank."""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_prep.utils.console import UserError, exit_on_user_error, show_only_errors
from data_prep.utils.progress import Progress
from pretrain.local_gpu import select_gpu
from pretrain.training.distributed import leave_group, normalize_launcher_env

Entry = TypeVar("Entry")

PATIENCE = timedelta(days=30)
"""Timeout of the workers, which wait while rank 0 trains, scores or waits for a checkpoint.

If rank 0 dies, the workers notice it immediately.
"""


def run_with_workers(evaluate: Callable[[], None]) -> None:
    """Evaluate on rank 0, with all other ranks as workers until it has ended; then end this process.

    The exit code is 2 for a UserError.
    """
    normalize_launcher_env()
    if torch.cuda.is_available():
        select_gpu()
    dist.init_process_group("gloo", timeout=PATIENCE)  # only Python objects are sent
    code = 0
    try:
        if dist.get_rank() == 0:
            exit_on_user_error(evaluate)
        else:
            show_only_errors()
            while (work := _broadcast(None)) is not None:
                function, folder, rows, options = work
                function(folder, rows, **options)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        if dist.get_rank() == 0:
            _broadcast(None)
    leave_group(code)


def shard_rows(function: Callable[..., list[Entry]]) -> Callable[..., list[Entry]]:
    """Decorate `function(folder, rows, **options)`, which returns an entry for each row, to run on all ranks.

    With n ranks, each rank processes every n-th row. The decorated function raises UserError, or RuntimeError with the
    message of the rank that failed.
    """

    @functools.wraps(function)
    def shared(folder: Any, rows: list[Any], **options: Any) -> list[Entry]:
        if not dist.is_initialized():
            return function(folder, rows, **options)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if rank == 0:
            _broadcast((shared, folder, rows, options))
        error: Exception | None = None
        local_entries: list[Entry] = []
        try:
            local_entries = function(folder, rows[rank::ranks], **options) if rows[rank::ranks] else []
        except Exception as caught:
            error = (
                caught
                if isinstance(caught, UserError)
                else RuntimeError(f"rank {rank}: {type(caught).__name__}: {caught}")
            )
        gathered: list[Any] | None = [None] * ranks if rank == 0 else None
        dist.gather_object((error, local_entries), gathered)
        if gathered is None:
            return local_entries
        errors = [problem for problem, _ in gathered if problem]
        if errors:
            raise errors[0]
        entries: list[Any] = [None] * len(rows)
        for number, (_, part) in enumerate(gathered):
            entries[number::ranks] = part
        return entries

    return shared


def row_progress(title: str, count: int, unit: str = "rows") -> Progress:
    """Return the progress of this rank in a function that `shard_rows` decorates; only rank 0 shows it."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return Progress(title, count, unit if ranks == 1 else f"{unit} of the first of {ranks} processes")


def _broadcast(value: Any) -> Any:
    """Return the value of rank 0 on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
