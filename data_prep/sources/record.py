"""What a source is cut into, and what it yields."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True)
class Piece:
    """What is read on its own: a byte range of a plain file, row groups, a whole compressed or small file."""

    path: str
    """Of the file, for messages."""
    start: int
    """The first byte, row group, shard or record."""
    stop: int
    """The one behind the last."""
    size: int
    """Bytes on disk."""


class Record(NamedTuple):
    """One record, or why there is none."""

    views: tuple[str, ...] | None
    """Text of each of `data.views`, empty where the record lacks one; None: no record, see `reason` and `problem`."""
    position: int
    """Line or row, from 1, within the piece; `Reader.place` turns it into a place that a person can look at."""
    problem: str = ""
    """One line: why there is none."""
    reason: str = "malformed"
    """`malformed` stops the preparation unless `data.on_malformed` is drop; any other reason is always dropped and counted."""
    group: str = ""
    """Records of one group are held out for validation together; empty: drawn by a text of the record, see data_prep/holdout.py."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The views of a record that is known to have them."""
        assert self.views is not None
        return self.views


class Reader(Protocol):
    """One source, opened."""

    provided_views: tuple[bool, ...]
    """Which of `data.views` this source fills at all; its records are judged by those alone."""
    note: str
    """A line about files that look like its own and are not read; empty if there are none."""

    def pieces(self) -> list[Piece]:
        """In order, the same on every machine. Reads no whole file."""

    def read(self, piece: Piece) -> Iterator[Record]:
        """The records of a piece, in order. Raises UserError where the file cannot be read."""

    def count(self, piece: Piece) -> int:
        """Positions in a piece of a file that is cut into several; 0 for a whole file."""

    def place(self, piece: Piece, position: int, before: int) -> str:
        """The place of a record, for people: `file:line`. `before`: positions in the earlier pieces of the same file."""
