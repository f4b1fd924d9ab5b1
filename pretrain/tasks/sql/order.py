"""The order of a query's rows, and the ties that it leaves open.

A target such as `SELECT name FROM player ORDER BY score` leaves open which of two players with equal scores comes
first, so both orders are right. To find the ties, the target is run twice more with all of its columns as further sort
keys: once ascending and once descending. The two runs order each group of ties in opposite ways. The groups are the
shortest ranges of rows that hold the same multiset of rows in both results.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.tasks.sql.execution import Outcome, QueryRunner, round_float_columns, spans

Rows = list[tuple[Any, ...]]


class Ordered(NamedTuple):
    """A query with an ORDER BY at its outermost level."""

    unlimited: str
    """The query without its LIMIT, to which further sort keys can be appended."""
    skipped: int | None
    """Number of rows that its OFFSET skips; None if the LIMIT or OFFSET is not a plain number."""


def outer_order_by(query: str) -> Ordered | None:
    """Split a query at the LIMIT of its outermost ORDER BY; return None if it has no such ORDER BY.

    Parentheses around the whole query are ignored. An ORDER BY inside any other parentheses does not count.
    """
    token_spans = _unwrapped(spans(query))
    words, depth, order_index, limit = [word for word, _, _ in token_spans], 0, None, len(token_spans)
    for index, word in enumerate(words):
        depth += (word == "(") - (word == ")")
        if depth == 0 and words[index : index + 2] == ["order", "by"]:
            order_index = index
        elif depth == 0 and word == "limit" and order_index is not None:
            limit = index
    if order_index is None:
        return None
    return Ordered(query[token_spans[0][1] : token_spans[limit - 1][2]], _parse_offset(" ".join(words[limit:])))


def _unwrapped(token_spans: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Remove final semicolons, and parentheses around the whole query."""
    while token_spans and token_spans[-1][0] == ";":
        token_spans = token_spans[:-1]
    while len(token_spans) > 2 and token_spans[0][0] == "(" and _closing_index(token_spans) == len(token_spans) - 1:
        token_spans = token_spans[1:-1]
    return token_spans


def _closing_index(token_spans: list[tuple[str, int, int]]) -> int | None:
    """Return the index of the parenthesis that closes the first token."""
    depth = 0
    for index, (word, _, _) in enumerate(token_spans):
        depth += (word == "(") - (word == ")")
        if depth == 0:
            return index
    return None


def _parse_offset(limit: str) -> int | None:
    if match := re.fullmatch(r"limit (?:(?P<before>\d+) , )?-? ?\d+(?: offset (?P<after>\d+))?|", limit):
        return int(match["before"] or match["after"] or 0)
    return None


def equal_up_to_ties(runner: QueryRunner, database: Path, target: str, wanted: Outcome, given: Outcome) -> bool:
    """Return whether an answer has the rows of an ordered target, in any order that the target's ties allow.

    If a LIMIT cuts through a group of ties, the answer may contain any rows of that group.
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
    sorted_both_ways = [
        runner.run(
            database,
            ordered.unlimited
            + "".join(f", {column} COLLATE BINARY {direction}" for column in range(1, wanted.columns + 1)),
        ).rows
        for direction in ("ASC", "DESC")
    ]
    if sorted_both_ways[0] is None or sorted_both_ways[1] is None:
        return False
    ascending, descending, rows = round_float_columns(sorted_both_ways[0], sorted_both_ways[1], given.rows)
    if Counter(ascending) != Counter(descending):  # the query uses random numbers
        return False
    index = -ordered.skipped
    for group in _groups(ascending, descending):
        begin, end = max(index, 0), max(min(index + len(group), len(rows)), 0)
        if Counter(rows[begin:end]) - Counter(group):
            return False
        index += len(group)
    return index >= len(rows)


def _groups(ascending: Rows, descending: Rows) -> list[Rows]:
    """Cut two orders of the same rows into the shortest ranges that hold the same multiset of rows in both."""
    groups: list[Rows] = []
    balance: Counter[tuple[Any, ...]] = Counter()
    begin = 0
    for index, (one, other) in enumerate(zip(ascending, descending, strict=True), start=1):
        for row, change in ((one, 1), (other, -1)):
            balance[row] += change
            if not balance[row]:
                del balance[row]
        if not balance:
            groups.append(ascending[begin:index])
            begin = index
    return groups
