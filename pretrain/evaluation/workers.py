"""Several processes for one evaluation: rank 0 does it, and shares the rows of what takes long with the others, a GPU each."""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_prep.console import UserError, exit_on_user_error
from pretrain.local_gpu import select_gpu
from pretrain.training.distributed import leave_group, normalize_launcher_env

Entry = TypeVar("Entry")

PATIENCE = timedelta(days=30)
"""Helpers wait as long as rank 0 trains, scores, or waits for a checkpoint; where it dies, they notice at once."""


def run_with_workers(evaluate: Callable[[], None]) -> None:
    """Join the ranks; evaluate on rank 0, and help on the others until that has ended. Then end this process, with exit code 2 for a UserError."""
    normalize_launcher_env()
    if torch.cuda.is_available():
        select_gpu()
    dist.init_process_group("gloo", timeout=PATIENCE)  # of Python objects alone
    code = 0
    try:
        if dist.get_rank() == 0:
            exit_on_user_error(evaluate)
        else:
            while (work := _broadcast(None)) is not None:
                function, folder, rows, more = work
                function(folder, rows, **more)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        if dist.get_rank() == 0:
            _broadcast(None)
    leave_group(code)


def shard_rows(function: Callable[..., list[Entry]]) -> Callable[..., list[Entry]]:
    """Decorates `function(folder, rows, **more)`, which returns an entry for each row: with helpers, each rank takes every n-th row.

    Raises UserError, or RuntimeError with the message of the rank that failed.
    """

    @functools.wraps(function)
    def shared(folder: Any, rows: list[Any], **more: Any) -> list[Entry]:
        if not dist.is_initialized():
            return function(folder, rows, **more)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if rank == 0:
            _broadcast((shared, folder, rows, more))
        error: Exception | None = None
        mine: list[Entry] = []
        try:
            mine = function(folder, rows[rank::ranks], **more) if rows[rank::ranks] else []
        except Exception as caught:
            error = (
                caught
                if isinstance(caught, UserError)
                else RuntimeError(f"rank {rank}: {type(caught).__name__}: {caught}")
            )
        found: list[Any] | None = [None] * ranks if rank == 0 else None
        dist.gather_object((error, mine), found)
        if found is None:
            return mine
        errors = [problem for problem, _ in found if problem]
        if errors:
            raise errors[0]
        entries: list[Any] = [None] * len(rows)
        for number, (_, part) in enumerate(found):
            entries[number::ranks] = part
        return entries

    return shared


def _broadcast(value: Any) -> Any:
    """What rank 0 has, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
