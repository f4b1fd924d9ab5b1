"""Logs of the ranks: a file for each rank, and the console for rank 0."""

import contextlib
import faulthandler
import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import TextIO

from data_prep.utils.console import Tee, UserError
from pretrain.training import console_copy

LOGS = "logs"
"""Folder of the logs in the run directory."""
COPY_TIMEOUT = 10.0
"""Time limit for copying the last output of libraries to the console, in seconds."""


class RankLog:
    """Redirection of a rank's output and errors to `logs/rank-NNNNN.log`; rank 0 also prints to the console.

    The redirection covers the output of C++ libraries, even if they abort the process. On rank 0 a separate process
    (console_copy.py) copies the libraries' output, which may appear slightly after Python's. A rank continues even if
    the disk is full or the console is closed.
    """

    def __init__(self, run_dir: Path, rank: int):
        path = run_dir / LOGS / f"rank-{rank:05}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", buffering=1, encoding="utf-8", errors="replace")  # noqa: SIM115 (stays open)
        except OSError as error:
            raise UserError(f"cannot write to {run_dir} (output_dir/name): {error.strerror}") from None
        self.path = path
        self._is_main = rank == 0
        self._streams = sys.stdout, sys.stderr
        self._consoles: list[TextIO] = []
        self._console_descriptors: list[int] = []
        self._copier: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "RankLog":
        self._consoles = [_console(stream, descriptor) for descriptor, stream in enumerate(self._streams, 1)]
        if self._is_main:
            self._start_copier()
            sys.stdout, sys.stderr = (Tee(console, self._file) for console in self._consoles)
        else:
            for descriptor in (1, 2):
                os.dup2(self._file.fileno(), descriptor)
            sys.stdout = sys.stderr = Tee(self._file)
        faulthandler.enable(2)  # prints the Python traceback if SIGBUS, SIGSEGV or SIGABRT ends the process
        with contextlib.suppress(OSError):  # the disk may be full
            self._file.write(
                f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} on {socket.gethostname()}, process {os.getpid()}\n"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        sys.stdout, sys.stderr = self._streams

    def close(self) -> None:
        """Flush all output. On rank 0, send libraries' output to the console again and wait for the copying process."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._copier:
            for descriptor, console in enumerate(self._console_descriptors, 1):
                os.dup2(console, descriptor)
                os.close(console)
            with contextlib.suppress(subprocess.TimeoutExpired):  # another process may keep the pipes open
                self._copier.wait(COPY_TIMEOUT)
            self._copier = None

    def _start_copier(self) -> None:
        for stream in self._streams:
            stream.flush()
        pipes = [os.pipe() for _ in self._streams]
        descriptors = [pipes[0][0], pipes[1][0], self._file.fileno()]
        self._copier = subprocess.Popen(
            [sys.executable, "-S", console_copy.__file__, *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
        )
        self._console_descriptors = [os.dup(descriptor) for descriptor in (1, 2)]
        for descriptor, (read_end, write_end) in enumerate(pipes, 1):
            os.dup2(write_end, descriptor)
            os.close(read_end)
            os.close(write_end)

    def write_traceback(self, error: BaseException) -> None:
        """Write a traceback to the file only."""
        with contextlib.suppress(OSError):
            traceback.print_exception(error, file=self._file)

    def print_fatal(self, text: str) -> None:
        """Print to the console, on any rank, and to the file."""
        for stream in (self._consoles[1], self._file):
            with contextlib.suppress(OSError):
                print(text, file=stream, flush=True)


def _console(stream: TextIO, descriptor: int) -> TextIO:
    """Return a stream that still writes to the current target of `stream` after its descriptor has been redirected."""
    try:
        is_descriptor = stream.fileno() == descriptor
    except OSError:  # a Python stream without a descriptor
        is_descriptor = False
    return os.fdopen(os.dup(descriptor), "w", buffering=1, errors="replace") if is_descriptor else stream
