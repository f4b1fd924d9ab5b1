"""A pytest plugin for `make mutants`: a test also covers the functions that its fixtures called.

mutmut credits a function to the test during which it is called. A module- or session-scoped fixture is set up during the first of
its tests, so without this plugin the other tests would never run against mutants of the code that the fixture calls.
"""

from collections.abc import Generator

import pytest
from mutmut.state import state

_hits: dict[pytest.FixtureDef, set[str]] = {}
"""Functions called by the latest setup of each fixture."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse tests that pytest does not find again by their ids: mutmut would count that error as a killed mutant."""
    for item in items:
        if "\\" in item.nodeid:
            raise pytest.UsageError(
                f"{item.nodeid}: the id has an escaped character. Give the parameters ids of plain characters."
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
