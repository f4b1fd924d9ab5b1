"""Ranks as threads of the test process, for code that needs only gather_objects and barrier."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from data_prep.utils.console import UserError
from pretrain.training.distributed import World
from tests.processes import TIMEOUT


@dataclass(frozen=True, kw_only=True)
class RankThread(World):
    """A rank that is a thread. All ranks share `values` and `thread_barrier`."""

    values: list[Any]
    thread_barrier: threading.Barrier

    def gather_objects(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.thread_barrier.wait()
        gathered = list(self.values)
        self.thread_barrier.wait()
        return gathered

    def barrier(self) -> None:
        self.thread_barrier.wait()


def run_on_ranks(size: int, action: Callable[[World], Any]) -> list[Any]:
    """Return the result of `action` on each rank, or the UserError that it raises there."""
    values, thread_barrier = [None] * size, threading.Barrier(size, timeout=TIMEOUT)

    def run(rank: int) -> Any:
        try:
            return action(RankThread(rank, size, torch.device("cpu"), values=values, thread_barrier=thread_barrier))
        except UserError as error:  # all ranks raise the same error
            return error
        except Exception:
            thread_barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
