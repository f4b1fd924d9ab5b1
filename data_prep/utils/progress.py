"""Progress of slow steps: a line that renews itself on a terminal, and a line every few seconds in a log."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from data_prep.utils.console import duration

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

RENEWAL_SECONDS = 1.0
"""Time between two renewals of the terminal's line and of the file of `saved_progress`, in seconds."""
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt} {unit}{postfix}"

_saved: list[tuple[Path, str]] = []
"""The file that describes the current step, and the name of the work that the step is part of."""


class Progress:
    """Progress of a step with `total` units of work, such as rows. Use as a context manager, and call `update`.

    A step of a single unit shows nothing. A step with a `delay`, in seconds, shows nothing before it.
    """

    LINE_SECONDS: ClassVar[float] = 10.0
    """Time between two lines in a log, in seconds."""

    def __init__(self, title: str, total: int, unit: str = "rows", delay: float = 0.0):
        self.title, self.total, self.unit, self.delay = title, total, unit, delay
        self.done = 0
        self.started = self.last_line = time.monotonic()
        self.last_renewal = float("-inf")
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        if not self.delay:
            self._open_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    @property
    def is_due(self) -> bool:
        """Whether `update` would show something now."""
        return time.monotonic() - self.last_renewal >= RENEWAL_SECONDS

    def update(self, count: int, begun: float = 0.0) -> None:
        """Add finished units. `begun` is the work that has been done on other units, in units, for the time left."""
        self.done += count
        finished = self.done >= self.total
        if not (self.is_due or finished):
            return
        self.last_renewal = time.monotonic()
        if self.bar is None and not finished and self.last_renewal - self.started >= self.delay:
            self._open_bar()
        text = self.describe(self.last_renewal - self.started, self.done + begun)
        if begun:
            text = f"{(self.done + begun) / self.total:.0%} of the work, {text}"
        if self.bar is not None:
            self.bar.n = self.done
            self.bar.set_postfix_str(text)
        elif self._line_is_due and not finished:
            self.last_line = self.last_renewal
            logger.info(f"{self.title}: {self.amount}, {text}")
        for path, work in _saved:
            with contextlib.suppress(OSError):  # such as a full disk
                path.write_text(f"{work}: {self.title} {self.amount}, {text}", encoding="utf-8")

    @property
    def _line_is_due(self) -> bool:
        """Whether a log gets a line now."""
        delayed = self.last_renewal - self.started < self.delay
        return self.last_renewal - self.last_line >= self.LINE_SECONDS and self.total > 1 and not delayed

    def _open_bar(self) -> None:
        """Open the line that renews itself, if the messages go to a terminal."""
        if self.total > 1 and sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
            from tqdm import tqdm  # imported late: most commands show no progress

            self.bar = tqdm(
                total=self.total, desc=self.title, unit=self.unit, unit_scale=self.unit == "B", bar_format=BAR
            )

    @property
    def amount(self) -> str:
        """The finished units of all units."""
        return f"{self.done:,} of {self.total:,} {self.unit}"

    def describe(self, seconds: float, work: float) -> str:
        """Return the time left, which follows the finished units; `work` is their number with the work begun."""
        if not work:
            return f"{duration(seconds)} so far"
        return f"{duration(seconds * (self.total - work) / work)} left"


@contextlib.contextmanager
def saved_progress(path: Path, work: str) -> Iterator[None]:
    """Keep a line about the progress of the steps in this context in a file, which is removed at the end."""
    _saved.append((path, work))
    with contextlib.suppress(OSError):
        path.write_text(work, encoding="utf-8")
    try:
        yield
    finally:
        _saved.pop()
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
