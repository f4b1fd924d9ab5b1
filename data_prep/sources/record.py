"""Pieces and records of a source."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True)
class Piece:
    """A part of a source that is read separately: a byte range, row groups, or a complete compressed or small file."""

    path: str
    """Path of the file, for messages."""
    start: int
    """First byte, row group, shard or record."""
    stop: int
    """End of the range, exclusive."""
    size: int
    """Size on disk, in bytes."""


class Record(NamedTuple):
    """One record, or the reason why it could not be read."""

    views: tuple[str, ...] | None
    """Text of each of `data.views`, empty for a view that the record lacks. None if the record could not be read; see
    `reason` and `problem`."""
    position: int
    """Line or row within the piece, from 1; `Reader.place` converts it to a location for messages."""
    problem: str = ""
    """Reason why the record could not be read, in one line."""
    reason: str = "malformed"
    """Kind of the problem. `malformed` (this record cannot be read) and `damaged` (neither can the rest of the file)
    stop the preparation unless `data.on_malformed` is drop. Any other kind is always dropped and counted."""
    group: str = ""
    """Group of records that are held out for validation together. If empty, a text of the record decides; see
    data_prep/holdout.py."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the views of a record that is known to have them."""
        assert self.views is not None
        return self.views


class Reader(Protocol):
    """An open source."""

    provided_views: tuple[bool, ...]
    """Whether this source provides each of `data.views`; its records are checked for the provided views only."""
    note: str
    """Note about skipped files; empty if there are none."""

    def pieces(self) -> list[Piece]:
        """Return the pieces in order, the same on every machine, without reading complete files."""

    def read(self, piece: Piece) -> Iterator[Record]:
        """Yield the records of a piece in order. Raises UserError if the file cannot be read."""

    def count(self, piece: Piece) -> int:
        """Return the number of positions in a piece of a file that has several pieces; 0 for a complete file."""

    def place(self, piece: Piece, position: int, before: int) -> str:
        """Return the location of a record for messages, such as `file:line`.

        `before` is the number of positions in the earlier pieces of the same file.
        """
