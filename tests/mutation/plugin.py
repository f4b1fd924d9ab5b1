"""A pytest plugin for `make mutants`: a test also covers the functions that its fixtures call.

mutmut assigns a function to the test that runs when the function is called. A module- or session-scoped fixture is set
up during the first of its tests. Without this plugin, the other tests would therefore never run against mutants of the
code that the fixture calls.
"""

from collections.abc import Generator

import pytest
from mutmut.state import state

_hits: dict[pytest.FixtureDef, set[str]] = {}
"""Functions that the latest setup of each fixture called."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Raise UsageError for tests that pytest cannot find by their ids.

    mutmut would count the resulting error as a killed mutant.
    """
    for item in items:
        if "\\" in item.nodeid:
            raise pytest.UsageError(
                f"{item.nodeid}: the id has an escaped character. Give the parameters ids of printable characters."
            )


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> Generator[None, object, object]:
    before = set(state()._stats)
    state()._stats.clear()
    try:
        return (yield)
    finally:
        _hits[fixturedef] = set(state()._stats)
        state()._stats.update(before)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    for name in item.fixturenames:
        for fixturedef in item._fixtureinfo.name2fixturedefs.get(name, ()):
            state()._stats.update(_hits.get(fixturedef, ()))
