"""Processes that a study starts on this machine. A signal to the study reaches all of them."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from pretrain.training.evaluation_requests import die_with_parent


class ProcessRunner:
    """Runner that executes commands, each in the thread of its caller, and forwards SIGINT and SIGTERM to them."""

    def __init__(self, lock: IO[bytes]):
        self._lock = lock
        self._running: dict[subprocess.Popen[bytes], bool] = {}
        """Whether signals go to the process group of each running command instead of only to its first process."""
        self.stopped: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def train(
        self, launcher_dir: Path, launch: str, config: Path, log: Path, environment: Mapping[str, str] | None = None
    ) -> int:
        """Train a run under launcher/supervise.py and return the exit code.

        `environment` is added to the environment of this process. The supervisor forwards signals to all ranks and
        makes sure that no rank stays alive.
        """
        words = shlex.split(launch) or [sys.executable]
        supervisor = [sys.executable, str(launcher_dir / "supervise.py"), "--"]
        return self._run([*supervisor, *words, str(launcher_dir / "run.py"), str(config)], log, environment)

    def evaluate(
        self, launcher_dir: Path, run_dir: Path, log: Path, environment: Mapping[str, str] | None = None
    ) -> int:
        """Evaluate the last checkpoint of a run and return the exit code; for `environment`, see `train`."""
        return self._run(
            [sys.executable, str(launcher_dir / "evaluate.py"), str(run_dir)], log, environment, group=True
        )

    def stop(self, number: signal.Signals) -> None:
        """Forward a signal to all running commands. A command that is started later receives it too."""
        self.stopped = number
        for process, group in list(self._running.items()):
            self._forward(number, process, group)

    def _receive(self, number: int, frame: Any) -> None:
        self.stop(signal.Signals(number))

    def _run(self, command: list[str], log: Path, environment: Mapping[str, str] | None, *, group: bool = False) -> int:
        """Run a command and return its exit code.

        With `group`, signals go to all processes of the command instead of only to the first.

        If the thread that called this ends, the command gets SIGTERM. The command holds the study's lock until it has
        ended, so the study cannot be launched a second time while the command runs.
        """
        with open(log, "a") as output:
            process = subprocess.Popen(
                die_with_parent(command, "TERM"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[self._lock.fileno()],
                env=os.environ | environment if environment else None,
            )
        self._running[process] = group
        if self.stopped:  # the signal arrived before the process was listed
            self._forward(self.stopped, process, group)
        code = process.wait()
        del self._running[process]
        return code

    @staticmethod
    def _forward(number: signal.Signals, process: subprocess.Popen[bytes], group: bool) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(process.pid, number)
