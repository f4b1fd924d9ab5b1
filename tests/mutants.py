"""Helpers that test the tests: a check passes on the unchanged project, and fails after a mistake is planted."""

import re
from collections.abc import Callable

import pytest

Mutant = Callable[[pytest.MonkeyPatch], None]


def assert_detects_mutant(mutant: Mutant, check: Callable[[], None], because: str) -> None:
    """Assert that `check` passes, and that it fails with the text `because` after `mutant` has patched the project."""
    check()
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        assert_fails_with(check, because)


def assert_fails_with(check: Callable[[], None], because: str) -> None:
    """Assert that the check raises AssertionError with the text `because`."""
    with pytest.raises(AssertionError, match=re.escape(because)):
        check()
