"""Settings for all tests."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.messages import receive_messages

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# The background jobs of a shell ignore SIGINT, and the commands under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    "test_cold_commands.py",
    "test_study_runs.py",
    "test_launchers.py",
    "test_health.py",
    "test_startup_imports.py",
)
"""Files with the longest tests. They run first, because otherwise one worker would still run them at the end."""


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """List of the log messages so far, as lines of the console."""
    lines: list[str] = []
    with receive_messages(lines.append):
        yield lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests of the LONGEST files to the front."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
