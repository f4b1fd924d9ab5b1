"""Filters that drop records by the text of their views."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from data_prep.config import FiltersConfig

LIMIT_SECONDS = 10.0
"""CPU time in which `forbidden` must decide about a record, in seconds. Python's `re` takes microseconds for most
expressions, and practically forever for an ambiguous expression. A timeout never drops a record, because the content of
a corpus must not depend on the speed of the machine."""
TICKS = 20
"""Timer signals within LIMIT_SECONDS. The timer runs all the time: setting one for each record would take longer
than most searches."""
_ticks: int | None = None
"""Signals since the current search began; None outside a search."""


class SearchTimeoutError(Exception):
    """Error raised if the search for `forbidden` in a record does not end; the message is one line."""


def filter_reason(views: tuple[str, ...], filters: FiltersConfig) -> str:
    """Return the first reason to drop a record, or "" to keep it.

    The reasons are checked in this order: `nul`, `too_short`, `too_many_characters`, `forbidden`. `views` has ""
    for a view that the record lacks, and the filters ignore it. Lengths are in characters (code points). Raises
    SearchTimeoutError within `search_time_limit`.
    """
    present = [view for view in views if view]
    lengths = list(map(len, present))
    if "\0" in "".join(present):
        return "nul"
    if lengths and min(lengths) < filters.min_characters:
        return "too_short"
    if lengths and filters.max_characters is not None and max(lengths) > filters.max_characters:
        return "too_many_characters"
    if filters.forbidden is not None:
        return "forbidden" if _matches(_compiled(filters.forbidden), present) else ""
    return ""


@contextmanager
def search_time_limit(filters: FiltersConfig) -> Iterator[None]:
    """Let `filter_reason` raise SearchTimeoutError in this block.

    It never raises outside the main thread, because only the main thread receives signals.
    """
    if filters.forbidden is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handler = signal.signal(signal.SIGVTALRM, _tick)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_SECONDS / TICKS, LIMIT_SECONDS / TICKS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous_handler)


def _matches(expression: re.Pattern[str], views: list[str]) -> bool:
    global _ticks
    _ticks = 0
    try:
        return any(map(expression.search, views))
    finally:
        _ticks = None


def _tick(*_: Any) -> None:
    global _ticks
    if _ticks is None:
        return
    _ticks += 1
    if _ticks > TICKS:
        raise SearchTimeoutError(
            f"data.filters.forbidden: the search did not end within {LIMIT_SECONDS:g} s of CPU time, because the "
            "expression can match in too many ways. Rewrite it without nested repetitions, or make them possessive, "
            "such as (?:a++b?)++"
        )


@cache
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)
