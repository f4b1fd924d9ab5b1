"""Which records are left out by the text of their views, and why."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from data_prep.config import FiltersConfig

LIMIT_SECONDS = 10.0
"""CPU time in which `forbidden` must decide about a record. Python's `re` takes microseconds, or, where it tries every way to match an ambiguous
expression, longer than anybody waits. It is no reason to drop a record: what a corpus contains must not depend on the speed of the machine."""
TICKS = 20
"""Signals in this time. They come at this pace whatever is computed: a timer for each record would take longer than most searches."""
_ticks: int | None = None
"""Signals since the search at hand began; None outside of one."""


class SearchTimeoutError(Exception):
    """A record on which the search for `forbidden` does not end; the message is one line."""


def filter_reason(views: tuple[str, ...], filters: FiltersConfig) -> str:
    """Return the first reason to leave a record out, in this order, or "": `nul`, `too_short`, `too_many_characters`, `forbidden`.

    `views` has "" for a view that the record lacks: no filter looks at it. Lengths are in characters (code points).
    Raises Undecided within `search_time_limit`.
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
        return "forbidden" if _found(_compiled(filters.forbidden), present) else ""
    return ""


@contextmanager
def search_time_limit(filters: FiltersConfig) -> Iterator[None]:
    """Let `filter_reason` raise Undecided in this block. In other threads than the main one, which alone gets signals, it never does."""
    if filters.forbidden is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _tick)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_SECONDS / TICKS, LIMIT_SECONDS / TICKS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _found(expression: re.Pattern[str], views: list[str]) -> bool:
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
            f"data.filters.forbidden has not been decided after {LIMIT_SECONDS:g} s of computing: the expression can match in too many "
            "ways. Rewrite it so that a repetition is not repeated, or make it possessive, such as (?:a++b?)++"
        )


@cache
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)
