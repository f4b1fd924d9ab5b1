"""A signal to stop, kept until all ranks can agree on it."""

import contextlib
import os
import signal
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """A signal has ended the start of a run, before there is anything to save."""


class StopRequest:
    """A request to stop, set by SIGTERM, SIGINT or SIGUSR1.

    A second signal ends the process immediately, but not within GRACE seconds: launchers pass on a signal that their ranks
    have already had from the terminal or the scheduler. A thread watches the signals, because Python runs handlers on the
    main thread only, and that may hang in a collective.
    """

    GRACE = 10.0

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.since = 0.0
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # gets the number of each signal that has a handler
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()

    def _watch(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 16):
                if number in SIGNALS:
                    self._receive(signal.Signals(number))

    def _receive(self, number: signal.Signals) -> None:
        if self.received is not None:
            if time.monotonic() - self.since < self.GRACE:
                return
            os._exit(128 + number)
        self.received, self.since = number, time.monotonic()
        with contextlib.suppress(OSError):  # nobody may read it
            os.write(
                2,
                f"{number.name}: saving and stopping; signal again after {self.GRACE:.0f} s to exit immediately\n".encode(),
            )
