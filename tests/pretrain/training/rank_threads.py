"""Ranks as threads of the test process, for code that needs nothing but gather_objects and barrier."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from data_prep.console import UserError
from pretrain.training.distributed import World
from tests.processes import TIMEOUT


@dataclass(frozen=True, kw_only=True)
class RankThread(World):
    """One rank; `values` and `meeting` are shared by all of them."""

    values: list[Any]
    meeting: threading.Barrier

    def gather_objects(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.meeting.wait()
        gathered = list(self.values)
        self.meeting.wait()
        return gathered

    def barrier(self) -> None:
        self.meeting.wait()


def run_on_ranks(size: int, action: Callable[[World], Any]) -> list[Any]:
    """Return the result of `action` on each rank, or the UserError that it raises there."""
    values, meeting = [None] * size, threading.Barrier(size, timeout=TIMEOUT)

    def run(rank: int) -> Any:
        try:
            return action(RankThread(rank, size, torch.device("cpu"), values=values, meeting=meeting))
        except UserError as error:  # which all ranks raise together
            return error
        except Exception:
            meeting.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
