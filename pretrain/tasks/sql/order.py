"""The order of a query's rows: whether it says one, and which rows it leaves tied.

A target such as `SELECT name FROM player ORDER BY score` does not say which of two players of equal score comes first, so neither order is wrong.
Its ties are found by running it twice more, with all of its columns as further sort keys: ascending, which orders each group of ties one way, and
descending, which orders it the other way. The groups are the shortest runs of rows that are the same multiset in both results.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.tasks.sql.execution import Outcome, QueryRunner, round_float_columns, spans

Rows = list[tuple[Any, ...]]


class Ordered(NamedTuple):
    """A query with an ORDER BY of its own."""

    unlimited: str
    """The query up to its LIMIT, so that further sort keys can follow."""
    skipped: int | None
    """Number of rows that its OFFSET skips; None if that is not a plain number."""


def outer_order_by(query: str) -> Ordered | None:
    """Split a query that orders its own rows, by an ORDER BY outside of all parentheses but ones around the whole query; None for any other."""
    found = _unwrapped(spans(query))
    words, depth, order, limit = [word for word, _, _ in found], 0, None, len(found)
    for place, word in enumerate(words):
        depth += (word == "(") - (word == ")")
        if depth == 0 and words[place : place + 2] == ["order", "by"]:
            order = place
        elif depth == 0 and word == "limit" and order is not None:
            limit = place
    if order is None:
        return None
    return Ordered(query[found[0][1] : found[limit - 1][2]], _skipped(" ".join(words[limit:])))


def _unwrapped(found: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Remove final semicolons, and parentheses around the whole query."""
    while found and found[-1][0] == ";":
        found = found[:-1]
    while len(found) > 2 and found[0][0] == "(" and _closing(found) == len(found) - 1:
        found = found[1:-1]
    return found


def _closing(found: list[tuple[str, int, int]]) -> int | None:
    """Return the place of the parenthesis that closes the first one."""
    depth = 0
    for place, (word, _, _) in enumerate(found):
        depth += (word == "(") - (word == ")")
        if depth == 0:
            return place
    return None


def _skipped(limit: str) -> int | None:
    if match := re.fullmatch(r"limit (?:(?P<before>\d+) , )?-? ?\d+(?: offset (?P<after>\d+))?|", limit):
        return int(match["before"] or match["after"] or 0)
    return None


def equal_up_to_ties(runner: QueryRunner, database: Path, target: str, wanted: Outcome, given: Outcome) -> bool:
    """Whether the rows of an answer are those of a target that orders its rows, in an order that the target allows.

    Where a LIMIT cuts a group of ties, any of its rows may be the ones that are left.
    """
    ordered = outer_order_by(target)
    if (
        ordered is None
        or ordered.skipped is None
        or wanted.rows is None
        or given.rows is None
        or len(wanted.rows) != len(given.rows)
    ):
        return False
    ways = [
        runner.run(
            database,
            ordered.unlimited + "".join(f", {column} COLLATE BINARY {way}" for column in range(1, wanted.columns + 1)),
        ).rows
        for way in ("ASC", "DESC")
    ]
    if ways[0] is None or ways[1] is None:
        return False
    upward, downward, rows = round_float_columns(ways[0], ways[1], given.rows)
    if Counter(upward) != Counter(downward):  # it draws random numbers
        return False
    place = -ordered.skipped
    for group in _groups(upward, downward):
        begin, end = max(place, 0), max(min(place + len(group), len(rows)), 0)
        if Counter(rows[begin:end]) - Counter(group):
            return False
        place += len(group)
    return place >= len(rows)


def _groups(upward: Rows, downward: Rows) -> list[Rows]:
    """Cut two orders of the same rows into the shortest runs that hold the same rows in both."""
    groups: list[Rows] = []
    balance: Counter[tuple[Any, ...]] = Counter()
    begin = 0
    for place, (one, other) in enumerate(zip(upward, downward, strict=True), start=1):
        for row, change in ((one, 1), (other, -1)):
            balance[row] += change
            if not balance[row]:
                del balance[row]
        if not balance:
            groups.append(upward[begin:place])
            begin = place
    return groups
