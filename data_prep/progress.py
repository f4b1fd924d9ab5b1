"""How far a phase of the preparation is: a bar on a terminal, a line a minute in a log."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60


class Progress:
    """Bytes and records done, over all processes; a context manager around one phase."""

    def __init__(self, title: str, size: int, say: Callable[[str], None]):
        self.title, self.size, self.say = title, size, say
        self.done = self.records = 0
        self.started = self.said = time.monotonic()
        self.bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.size, desc=self.title, unit="B", unit_scale=True, mininterval=0.5)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, size: int, records: int) -> None:
        """Count a finished task of `size` bytes of input and so many records."""
        self.done += size
        self.records += records
        seconds = max(1e-9, time.monotonic() - self.started)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.records / seconds:,.0f} records/s", refresh=False)
            self.bar.update(size)
        elif time.monotonic() - self.said >= SECONDS_BETWEEN_LINES and self.done < self.size:
            self.said = time.monotonic()
            left = seconds * (self.size - self.done) / max(1, self.done)
            self.say(
                f"{self.title}: {self.done / self.size:.0%}, {self.records / seconds:,.0f} records/s, {self.done / seconds / 1e6:,.1f} MB/s, "
                f"{max(1, round(left / 60)):,} min left"
            )
