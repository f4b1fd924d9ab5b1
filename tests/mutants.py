"""Tests of tests: a check passes on the project as it is, and fails where a mistake is put in."""

import re
from collections.abc import Callable

import pytest

Mutant = Callable[[pytest.MonkeyPatch], None]


def assert_detects_mutant(mutant: Mutant, check: Callable[[], None], because: str) -> None:
    """`check` raises AssertionError with the words `because`, once `mutant` has patched the project, and not before."""
    check()
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        assert_fails_with(check, because)


def assert_fails_with(check: Callable[[], None], because: str) -> None:
    """The check raises AssertionError for that reason."""
    with pytest.raises(AssertionError, match=re.escape(because)):
        check()
