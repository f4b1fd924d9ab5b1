"""What each rank says: in a file of its own, rank 0 on the console too."""

import contextlib
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import TextIO

from data_prep.console import UserError

LOGS = "logs"
"""Folder of the run directory."""


class RankLog:
    """Standard output and standard error of this rank go to `logs/rank-00000.log` from here on, those of rank 0 to the console as well.

    Other ranks write to their file alone, whatever writes there, libraries of C++ among them. Of rank 0 these reach the console alone.
    """

    def __init__(self, run_dir: Path, rank: int):
        path = run_dir / LOGS / f"rank-{rank:05}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", buffering=1, encoding="utf-8", errors="replace")  # noqa: SIM115 (open until the end)
        except OSError as error:
            raise UserError(f"cannot write to {run_dir} (output_dir/name): {error.strerror}") from None
        self.path, self._is_main = path, rank == 0
        self._streams = sys.stdout, sys.stderr

    def __enter__(self) -> "RankLog":
        if self._is_main:
            self._console: TextIO = self._streams[1]
            sys.stdout, sys.stderr = (_Tee(stream, self._file) for stream in self._streams)
        else:
            self._console = os.fdopen(os.dup(2), "w", buffering=1, errors="replace")
            for descriptor in (1, 2):
                os.dup2(self._file.fileno(), descriptor)
            sys.stdout = sys.stderr = _Tee(self._file)
        with contextlib.suppress(OSError):  # a full disk
            self._file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} on {socket.gethostname()}, process {os.getpid()}\n")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        sys.stdout, sys.stderr = self._streams

    def write_traceback(self, error: BaseException) -> None:
        """In the file alone."""
        with contextlib.suppress(OSError):
            traceback.print_exception(error, file=self._file)

    def last_words(self, text: str) -> None:
        """On the console, of any rank, and in the file."""
        for stream in (self._console, self._file):
            with contextlib.suppress(OSError):
                print(text, file=stream, flush=True)


class _Tee:
    """Writes to the first stream and, as far as there is room on the disk, to the other one."""

    def __init__(self, *streams: TextIO):
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            with contextlib.suppress(OSError) if stream is self._streams[-1] else contextlib.nullcontext():
                stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            with contextlib.suppress(OSError) if stream is self._streams[-1] else contextlib.nullcontext():
                stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._streams[0], name)
