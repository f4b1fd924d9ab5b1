"""A signal to stop, stored until all ranks can act on it together."""

import contextlib
import logging
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

from pretrain.training.hooks import Hook

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHER_GRACE = 30.0
"""Time after a signal until deepspeed, torchrun and, by default, Slurm kill the ranks, in seconds."""


class Stopped(Exception):
    """The end of a run by a signal during the set-up, before there is anything to save."""


class StopRequest:
    """A request to stop, set by SIGTERM, SIGINT or SIGUSR1.

    A second signal ends the process immediately, but is ignored within GRACE seconds of the first: launchers forward a
    signal that their ranks have already received from the terminal or the scheduler. A thread reads the signals,
    because Python runs handlers on the main thread only, and that thread may hang in a collective.
    """

    GRACE = 10.0
    """Time in which a repeated signal is ignored, in seconds."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.received_at = 0.0
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # receives the number of each signal with a handler
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
            if time.monotonic() - self.received_at < self.GRACE:
                return
            os._exit(128 + number)
        self.received = number
        self.received_at = time.monotonic()
        with contextlib.suppress(OSError):  # the output may be closed
            message = f"{number.name}: saving and stopping; signal again after {self.GRACE:.0f} s to exit immediately\n"
            os.write(2, message.encode())


class LauncherGraceNote(Hook):
    """A hook that notes once that a step and a save take longer than LAUNCHER_GRACE.

    A signal to the launcher would then lose steps.
    """

    def __init__(self) -> None:
        self._noted = False

    def after_save(self, run: "Trainer", step: int) -> None:
        """Compare the duration of the last step and of the save with the grace period."""
        needed = run.step_seconds + run.saver.duration
        if run.world.size > 1 and not self._noted and needed > LAUNCHER_GRACE:
            self._noted = True
            logger.info(
                f"note: a step and a save take {needed:.0f} s, but launchers kill the ranks {LAUNCHER_GRACE:.0f} s "
                "after Ctrl-C or SIGTERM, which loses the steps since the last checkpoint: to stop this run, send "
                "SIGUSR1 to one of its ranks"
            )
