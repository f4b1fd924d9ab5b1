"""Console output of the commands, and the handling of user errors: one line, exit code 2.

Messages about the progress of a command use the standard `logging` module. A module logs to
`logging.getLogger(__name__)`: `info` for progress and notes, `warning` for problems that do not end the command. The
messages are shown once `exit_on_user_error` has called `show_messages`. Tables and results are printed.
"""

import contextlib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TextIO

PACKAGES = ("data_prep", "pretrain", "launcher")
"""Names of the loggers whose messages are shown. The handlers of other libraries stay as they are."""
LEVEL_VARIABLE = "LOGLEVEL"
"""Environment variable with the lowest level that is shown; the launchers of torch read it too."""
INTERRUPTED_EXIT_CODE = 130
"""Exit code after Ctrl-C, as in shells."""

_SPACE = "free space there, or choose another folder"
_PERMISSION = "change the permissions, or choose another folder"
FILE_SYSTEM_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EACCES: _PERMISSION,
    errno.EROFS: _PERMISSION,
    errno.ENOTDIR: "correct the path",
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""Errors of the file system that the user can fix, by their number."""
OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""Number of an error of the operating system in a message of safetensors."""


class UserError(Exception):
    """An error that the user can fix. It is printed as one line, and the exit code is 2.

    The message names the file, line or key, the problem, and the remedy.
    """


class LineFormatter(logging.Formatter):
    """A formatter that puts the level in front of warnings and errors only."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        line = super().format(record)
        return line if record.levelno < logging.WARNING else f"{record.levelname}: {line}"


class _ConsoleHandler(logging.Handler):
    """A handler that prints to the current `sys.stdout` or `sys.stderr`, which may be replaced during a run."""

    def __init__(self, stream: Literal["stdout", "stderr"]):
        super().__init__()
        self._stream = stream
        self.setFormatter(LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record. As for any `print`, a closed pipe is an error."""
        print(self.format(record), file=getattr(sys, self._stream), flush=True)


def show_messages(stream: Literal["stdout", "stderr"] = "stdout") -> None:
    """Show the messages of this project on a stream, from the level in LOGLEVEL on, by default INFO.

    Raises UserError for an unknown level.
    """
    level = os.environ.get(LEVEL_VARIABLE, "").strip().upper() or "INFO"
    if level not in logging.getLevelNamesMapping():
        raise UserError(f"the environment variable {LEVEL_VARIABLE} is {level}: set it to INFO, WARNING or ERROR")
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _ConsoleHandler)]
        logger.addHandler(_ConsoleHandler(stream))
        logger.setLevel(level)


def show_only_errors() -> None:
    """Show no more messages below ERROR in this process, because a peer shows the same ones."""
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.ERROR)


def exit_on_user_error(
    main: Callable[[], None],
    *,
    silent: Callable[[], bool] = lambda: False,
    messages: Literal["stdout", "stderr"] = "stdout",
) -> None:
    """Run `main` and exit cleanly: a UserError prints one line and exits with code 2, Ctrl-C with code 130.

    An error of the file system that the user can fix, such as a full disk, is treated as a UserError. `silent` returns
    whether this process must not print errors and messages, because a peer prints the same ones.
    `messages` is the stream of log messages; a command whose standard output is its result uses stderr. A closed output
    pipe (`| head`) ends the process silently.
    """
    try:
        show_messages(messages)
        if silent():
            show_only_errors()
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
    except Exception as error:
        problem = file_system_error(error)
        if problem is None:
            raise
        report(problem, silent())
        sys.exit(2)


def os_error_number(error: Exception) -> int | None:
    """Return the number of an error of the operating system, also if safetensors raised it; None for other errors."""
    if isinstance(error, OSError):
        return error.errno
    found = OS_ERROR.search(str(error))
    return int(found[1]) if found else None


def file_system_error(error: Exception) -> UserError | None:
    """Return the UserError for a full disk, a missing permission or an impossible path; None for any other error."""
    number = os_error_number(error)
    remedy = FILE_SYSTEM_REMEDIES.get(number or 0)
    if remedy is None:
        return None
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)
    where = f"{os.fsdecode(path)}: " if isinstance(path, str | bytes | os.PathLike) else "cannot write: "
    return UserError(f"{where}{os.strerror(number or 0)}; {remedy}")


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


def duration(seconds: float) -> str:
    """Return a duration as 1h02m, 3m05s or 12s."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the heading first. Only the first column is left-aligned; rows may omit their last columns."""
    columns = max(map(len, rows))
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(columns)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    separator = "-" * (sum(widths) + 2 * (columns - 1))
    print("\n" + "\n".join([lines[0], separator, *lines[1:]]), flush=True)
