"""What commands print, and how a mistake of the user ends: one line, exit code 2."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

INTERRUPTED_EXIT_CODE = 130
"""Exit code after Ctrl-C, as a shell gives it."""


class UserError(Exception):
    """A mistake of the user: printed as one line, exit code 2.

    The message says what is wrong, where (file, line or key), and what to do.
    """


def print_now(text: str) -> None:
    """Print without delay, so that the lines of several processes keep their order in a log."""
    print(text, flush=True)


def exit_on_user_error(main: Callable[[], None], *, silent: Callable[[], bool] = lambda: False) -> None:
    """Run `main`; end a UserError in one line on standard error and exit code 2, Ctrl-C in one line and exit code 130.

    `silent` is asked at the time of the error: where several processes meet the same mistake, one speaks. Where nobody reads the output
    any more (`| head`), the process ends without a word.
    """
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        report(error, silent())
        sys.exit(2)
    except KeyboardInterrupt:
        if not silent():
            with contextlib.suppress(OSError):
                print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED_EXIT_CODE)
    except BrokenPipeError:
        _discard(sys.stdout)
        sys.exit(1)


@contextlib.contextmanager
def ignore_output_errors() -> Iterator[None]:
    """Keep this process going if nobody reads what it prints, or the disk below it is full. What cannot be written is lost."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Tee, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in streams:
            try:
                stream.flush()
            except OSError:
                _discard(stream)


class Tee:
    """A text stream that writes to several others, and ignores each one that fails."""

    def __init__(self, *streams: TextIO):
        self._streams = streams

    def write(self, text: str) -> int:
        """Write to all streams."""
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush all streams."""
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streams[0], name)


def _discard(stream: TextIO) -> None:
    """Let a stream end in nothing: Python flushes it at the end, and would complain and exit with code 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def report(error: UserError, silent: bool = False) -> None:
    """Print the one line of an error on standard error."""
    if not silent:
        with contextlib.suppress(OSError):  # the exit code still says it
            print(f"error: {error}", file=sys.stderr, flush=True)
