"""Ranks as threads of the test process, for code that needs only the collectives of World."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.training.distributed import World

PATIENCE = 20.0
"""Seconds until a collective that some rank never enters fails."""


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


def on_ranks(size: int, action: Callable[[World], Any]) -> list[Any]:
    """Return what `action` returns on each rank, or the error that it raises there."""
    values, meeting = [None] * size, threading.Barrier(size, timeout=PATIENCE)

    def run(rank: int) -> Any:
        try:
            return action(RankThread(rank, size, torch.device("cpu"), values=values, meeting=meeting))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
