"""What commands print, and how a mistake of the user ends: one line, exit code 2."""

import os
import sys
from collections.abc import Callable

INTERRUPTED = 130
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
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it flushes at the end
        sys.exit(1)


def report(error: UserError, silent: bool = False) -> None:
    """Print the one line of an error on standard error."""
    if not silent:
        print(f"error: {error}", file=sys.stderr, flush=True)
