"""The processes that a study starts here: each ends, and saves what it has, when the study does."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from pretrain.training.evaluation_requests import die_with_parent


class ProcessRunner:
    """Starts one command after another; a signal that asks the study to stop is passed on to the one that runs."""

    def __init__(self, lock: IO[bytes]):
        self._lock = lock
        self._running: subprocess.Popen[bytes] | None = None
        self._group = False
        self.stopped: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def train(self, launcher_dir: Path, launch: str, config: Path, log: Path) -> int:
        """Train under launcher/supervise.py, which brings the signals to all ranks and leaves none behind; the exit code."""
        words = shlex.split(launch) or [sys.executable]
        return self._run(
            [
                sys.executable,
                str(launcher_dir / "supervise.py"),
                "--",
                *words,
                str(launcher_dir / "run.py"),
                str(config),
            ],
            log,
        )

    def evaluate(self, launcher_dir: Path, run_dir: Path, log: Path) -> int:
        """Evaluate the last checkpoint of a run; the exit code."""
        return self._run([sys.executable, str(launcher_dir / "evaluate.py"), str(run_dir)], log, group=True)

    def _run(self, command: list[str], log: Path, group: bool = False) -> int:
        """`group`: a signal goes to all processes of the command, and not to the first alone.

        The command gets SIGTERM when this process dies, and holds its lock until it has ended itself: so no second start meets it.
        """
        with open(log, "a") as output:
            self._group = group
            self._running = subprocess.Popen(
                die_with_parent(command, "TERM"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[self._lock.fileno()],
            )
        if self.stopped:  # while it was started
            self._pass_on(self.stopped)
        code = self._running.wait()
        self._running = None
        return code

    def _receive(self, number: int, frame: Any) -> None:
        self.stopped = signal.Signals(number)
        if self._running:
            self._pass_on(self.stopped)

    def _pass_on(self, number: signal.Signals) -> None:
        assert self._running is not None
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if self._group else os.kill)(self._running.pid, number)
