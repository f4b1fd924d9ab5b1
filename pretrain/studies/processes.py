"""Processes that a study starts on this machine, one at a time. A signal to the study reaches the running one."""

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
    """Runner that executes one command at a time and forwards SIGINT and SIGTERM to it."""

    def __init__(self, lock: IO[bytes]):
        self._lock = lock
        self._running: subprocess.Popen[bytes] | None = None
        self._group = False
        self.stopped: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def train(self, launcher_dir: Path, launch: str, config: Path, log: Path) -> int:
        """Train a run under launcher/supervise.py and return the exit code.

        The supervisor forwards signals to all ranks and makes sure that no rank stays alive.
        """
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
        """Evaluate the last checkpoint of a run and return the exit code."""
        return self._run([sys.executable, str(launcher_dir / "evaluate.py"), str(run_dir)], log, group=True)

    def _run(self, command: list[str], log: Path, group: bool = False) -> int:
        """Run a command and return its exit code.

        With `group`, signals go to all processes of the command instead of only to the first.

        If this process dies, the command gets SIGTERM. The command holds the study's lock until it has ended, so the
        study cannot be launched a second time while the command runs.
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
        if self.stopped:  # the signal arrived before self._running was set
            self._forward(self.stopped)
        code = self._running.wait()
        self._running = None
        return code

    def _receive(self, number: int, frame: Any) -> None:
        self.stopped = signal.Signals(number)
        if self._running:
            self._forward(self.stopped)

    def _forward(self, number: signal.Signals) -> None:
        assert self._running is not None
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if self._group else os.kill)(self._running.pid, number)
