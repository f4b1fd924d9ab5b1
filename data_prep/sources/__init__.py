"""Sources: where records come from.

A source is cut into units that do not depend on the number of workers. A unit yields records in order: the
text of each view, or the reason why there is none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from data_prep.config import JsonSource, NlrxSource, Source
from data_prep.console import UserError
from data_prep.sources.json_lines import JsonLines
from data_prep.sources.nlrx import Nlrx
from data_prep.sources.record import Record


@dataclass(frozen=True)
class Unit:
    """A piece of one source: records or bytes `start` to `stop`."""

    source: int
    start: int
    stop: int


class Reader(Protocol):
    """One source, opened."""

    def units(self) -> list[tuple[int, int]]:
        """Bounds of the units, in order."""

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """The records of one unit, in order."""

    def where(self, start: int, position: int) -> str:
        """The place of a record, for people: `file:line`."""


def open_source(source: Source, views: tuple[str, ...], name: str) -> Reader:
    """Open a source; `name` is its dotted key, for messages. Raises UserError where it cannot be read."""
    match source:
        case NlrxSource():
            if len(views) != 2:
                raise UserError(f"{name}: the grammar makes pairs, but data.views are {list(views)}: give two")
            return Nlrx(source)
        case JsonSource():
            return JsonLines(source, views, name)
