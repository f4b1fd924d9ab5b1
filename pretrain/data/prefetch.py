"""Prefetching: while a step is computed, a background thread prepares the data of the next steps."""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.data.batch import Batch
from pretrain.data.loader import Loader, Rows, Unit, count_targets, loss_denominators

PREFETCH_STEPS = 2
"""Maximum number of prepared steps."""


@dataclass(frozen=True)
class StepData:
    """The data of one step: the rows and counts of the global batch, and the micro batches of this rank."""

    rows: Rows
    targets: int
    """Number of next-token targets in these rows."""
    loss_denominators: dict[str, int]
    """Count that normalises each loss term; see `loss_denominators` in pretrain/data/loader.py."""
    batches: list[Batch]
    state: dict[str, Any]
    """State of the loader after this step."""


class Prefetch:
    """The steps of a loader in order, `count` rows each; a context manager that ends the thread.

    `units` has the unit of each loss term. On CUDA the batches are in pinned memory. Until the thread ends, nothing
    else may use the loader.
    """

    def __init__(
        self,
        loader: Loader,
        count: int,
        micro_batches: Callable[[Rows], Iterable[Batch]],
        units: Mapping[str, Unit],
        device: torch.device,
    ):
        self._loader = loader
        self._count = count
        self._micro_batches = micro_batches
        self._units = units
        self._pin = device.type == "cuda"
        set_device = functools.partial(torch.cuda.set_device, device) if self._pin else None
        self._thread = ThreadPoolExecutor(1, "prefetch", set_device)
        self._steps: deque[Future[StepData | None]] = deque(
            self._thread.submit(self._make) for _ in range(PREFETCH_STEPS)
        )
        self._waited = 0.0

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def failed(self) -> bool:
        """Wait until the next step is prepared, and return whether preparing it failed."""
        started = time.perf_counter()
        failed = self._steps[0].exception() is not None
        self._waited += time.perf_counter() - started
        return failed

    def next(self) -> StepData:
        """Return the next step.

        Raises the exception of the thread if it failed, and ValueError after the end of the loader's epochs.
        """
        self.failed()
        step = self._steps.popleft().result()
        if step is None:
            raise ValueError("the loader is exhausted")
        self._steps.append(self._thread.submit(self._make))
        return step

    def pop_wait_seconds(self) -> float:
        """Return the seconds spent waiting for data since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _make(self) -> StepData | None:
        if self._loader.exhausted:
            return None
        rows = self._loader.next_rows(self._count)
        batches = [batch.pin_memory_copy() if self._pin else batch for batch in self._micro_batches(rows)]
        layout = self._loader.layout
        counts = loss_denominators(rows, layout, self._units)
        return StepData(rows, count_targets(rows, layout), counts, batches, self._loader.state())
