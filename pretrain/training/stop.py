"""A signal to stop, kept until all ranks can agree on it."""

import os
import signal
import time
from typing import Any


class StopRequest:
    """A request to stop, set by SIGTERM, SIGINT or SIGUSR1.

    A second signal ends the process at once, but not within GRACE seconds: launchers pass on a signal that their ranks
    have already had from the terminal or the scheduler.
    """

    GRACE = 10.0

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.since = 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:
            if time.monotonic() - self.since < self.GRACE:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received, self.since = signal.Signals(number), time.monotonic()
        os.write(2, f"{self.received.name}: the run is to save and stop; a second signal after {self.GRACE:.0f} s ends it at once\n".encode())
