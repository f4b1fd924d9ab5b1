"""The embedded corpus: description/regex pairs generated from the NL-RX grammar."""

from collections.abc import Iterator

from data_prep.config import NlrxSource
from data_prep.nlrx_grammar import generate
from data_prep.sources.record import Piece, Record
from data_prep.sources.views import check_columns, first_and_last, make_mapping

PIECE_RECORDS = 4096
BYTES = 160
"""Approximate size of a record as a line of JSON, in bytes."""
COLUMNS = ("text", "code")


class Nlrx:
    """Reader of the first `records` records of a split. Any worker can generate any record from its index."""

    note = ""

    def __init__(self, source: NlrxSource, views: tuple[str, ...], name: str):
        self.source = source
        self.mapping = make_mapping(source, views, name, first_and_last(views, *COLUMNS))
        check_columns(self.mapping, COLUMNS, "the grammar", name)
        self.provided_views = self.mapping.provided_views

    def pieces(self) -> list[Piece]:
        """Divide the source into pieces; see `Reader.pieces`."""
        total = self.source.records
        bounds = [(start, min(start + PIECE_RECORDS, total)) for start in range(0, total, PIECE_RECORDS)]
        return [Piece(f"nlrx:{self.source.split}", start, stop, (stop - start) * BYTES) for start, stop in bounds]

    def read(self, piece: Piece) -> Iterator[Record]:
        """Read a piece; see `Reader.read`."""
        for index in range(piece.start, piece.stop):
            row = dict(zip(COLUMNS, generate(self.source.seed, self.source.split, index), strict=True))
            yield from self.mapping.records(row, index - piece.start + 1)

    def count(self, piece: Piece) -> int:
        """Count positions; see `Reader.count`."""
        return 0  # the place follows from the piece

    def place(self, piece: Piece, position: int, before: int) -> str:
        """Return the location of a record; see `Reader.place`."""
        return f"{piece.path}:{piece.start + position - 1}"
