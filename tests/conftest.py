"""Settings for all tests."""

import signal

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background jobs ignore it, and so would the commands under test

LONGEST = (
    "test_cold_commands.py",
    "test_study_runs.py",
    "test_launchers.py",
    "test_health.py",
    "test_startup_imports.py",
)
"""Files that come first, so that no worker is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests of the longest files to the front."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
