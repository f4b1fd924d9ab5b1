"""Progress of a phase of the preparation: a bar on a terminal, one line per minute in a log."""

import logging
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 60


class Progress:
    """A progress display of one phase: processed bytes and records of all processes. Use as a context manager."""

    def __init__(self, title: str, size: int):
        self.title, self.size = title, size
        self.done = self.records = 0
        self.started = self.last_line = time.monotonic()
        self.bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.size, desc=self.title, unit="B", unit_scale=True, mininterval=0.5)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, size: int, records: int) -> None:
        """Add a finished task: `size` bytes of input, and its number of records."""
        self.done += size
        self.records += records
        seconds = max(1e-9, time.monotonic() - self.started)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.records / seconds:,.0f} records/s", refresh=False)
            self.bar.update(size)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES and self.done < self.size:
            self.last_line = time.monotonic()
            seconds_left = seconds * (self.size - self.done) / max(1, self.done)
            logger.info(
                f"{self.title}: {self.done / self.size:.0%}, {self.records / seconds:,.0f} records/s, "
                f"{self.done / seconds / 1e6:,.1f} MB/s, {max(1, round(seconds_left / 60)):,} min left"
            )
