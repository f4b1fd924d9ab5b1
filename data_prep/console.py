"""What commands print, and how a mistake of the user ends: one line, exit code 2."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user: printed as one line, exit code 2.

    The message says what is wrong, where (file, line or key), and what to do.
    """


def print_now(text: str) -> None:
    """Print without delay, so that the lines of several processes keep their order in a log."""
    print(text, flush=True)


def exit_on_user_error(main: Callable[[], None], *, silent: Callable[[], bool] = lambda: False) -> None:
    """Run `main`; end a UserError in one line on standard error and exit code 2.

    `silent` is asked at the time of the error: where several processes meet the same mistake, one speaks.
    """
    try:
        main()
    except UserError as error:
        report(error, silent())
        sys.exit(2)


def report(error: UserError, silent: bool = False) -> None:
    """The one line of a mistake, on standard error."""
    if not silent:
        print(f"error: {error}", file=sys.stderr, flush=True)
