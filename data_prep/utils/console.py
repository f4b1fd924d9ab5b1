"""Console output of the commands, and the handling of user errors: one line, exit code 2."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

INTERRUPTED_EXIT_CODE = 130
"""Exit code after Ctrl-C, as in shells."""


class UserError(Exception):
    """An error that the user can fix. It is printed as one line, and the exit code is 2.

    The message names the file, line or key, the problem, and the remedy.
    """


def print_now(text: str) -> None:
    """Print and flush at once, to keep the lines of several processes in order in a log."""
    print(text, flush=True)


def exit_on_user_error(main: Callable[[], None], *, silent: Callable[[], bool] = lambda: False) -> None:
    """Run `main` and exit cleanly: a UserError prints one line and exits with code 2, Ctrl-C with code 130.

    `silent` is called when an error occurs and returns whether this process must not print the error, because a peer
    prints the same one. A closed output pipe (`| head`) ends the process silently.
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
    """Ignore failures to print, such as a closed pipe or a full disk. Text that cannot be written is lost."""
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
    """A text stream that writes to several other streams and ignores the ones that fail."""

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
    """Redirect a stream to /dev/null. Otherwise Python's flush at exit would fail, and the exit code would be 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def report(error: UserError, silent: bool = False) -> None:
    """Print an error as one line on standard error."""
    if not silent:
        with contextlib.suppress(OSError):  # the exit code still reports the error
            print(f"error: {error}", file=sys.stderr, flush=True)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the heading first. Only the first column is left-aligned; rows may omit their last columns."""
    columns = max(map(len, rows))
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(columns)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    separator = "-" * (sum(widths) + 2 * (columns - 1))
    print("\n" + "\n".join([lines[0], separator, *lines[1:]]), flush=True)
