"""CSV and TSV files: a header line with the names of the columns, then a row a record."""

import csv
from collections.abc import Iterator
from typing import BinaryIO

from data_prep.config import FileSource
from data_prep.console import UserError
from data_prep.sources import files
from data_prep.sources.record import Piece, Record
from data_prep.sources.views import ViewMapping, column_mapping

SUFFIXES = tuple(kind + (packed or "") for kind in (".csv", ".tsv") for packed in files.OPENERS)
BAD = "\udcff"
"""Stands in for a line of more than 16 MiB: as every byte that is not UTF-8, half of a surrogate pair."""


class Csv:
    """CSV or TSV files. A file is one piece, because quotes can only be matched from its beginning."""

    def __init__(
        self,
        source: FileSource,
        views: tuple[str, ...],
        name: str,
        found: list[str] | None = None,
        delimiter: str | None = None,
    ):
        self.delimiter = delimiter
        self.files, self.note = files.find_files_with_note(source, name, SUFFIXES) if found is None else (found, "")
        self.mappings: dict[str, ViewMapping] = {}
        for path in self.files:
            size = files.size_of(path)
            self.mappings[path] = column_mapping(
                source, views, header(Piece(path, 0, size, size), delimiter), path, name
            )
        self.provided_views = tuple(
            map(any, zip(*(mapping.provided_views for mapping in self.mappings.values()), strict=True))
        )

    def pieces(self) -> list[Piece]:
        """Cut the source, see `Reader.pieces`."""
        sizes = {path: files.size_of(path) for path in self.files}
        return [Piece(path, 0, size, size) for path, size in sizes.items()]

    def read(self, piece: Piece) -> Iterator[Record]:
        """Read a piece, see `Reader.read`. A position is the line on which a row starts."""
        mapping = self.mappings[piece.path]
        for line, row in read_objects(piece, self.delimiter):
            if isinstance(row, files.CorruptFileError):
                yield Record(None, line, str(row), "damaged")
            elif isinstance(row, ValueError):
                yield Record(None, line, str(row))
            else:
                yield from mapping.records(row, line)

    def count(self, piece: Piece) -> int:
        """Count positions, see `Reader.count`."""
        return 0

    def place(self, piece: Piece, position: int, before: int) -> str:
        """Describe a place, see `Reader.place`."""
        return f"{piece.path}:{before + position}"


def read_objects(
    piece: Piece, delimiter: str | None = None
) -> Iterator[tuple[int, dict[str, str] | ValueError | files.CorruptFileError]]:
    """Yield the rows of a file by the names of their columns, each with the line on which it starts, or why it cannot be read."""
    names, rows = header(piece, delimiter), _rows(piece, delimiter)
    next(rows)
    for line, row in rows:
        if isinstance(row, files.CorruptFileError):
            yield line, row
        elif isinstance(row, csv.Error):
            yield line, ValueError(f"not CSV ({row})")
        elif len(row) != len(names):
            yield line, ValueError(f"{len(row)} fields, but the header has {len(names)}")
        elif any(not field.isascii() and not _is_text(field) for field in row):
            yield line, ValueError("not UTF-8, or a line of more than 16 MiB")
        else:
            yield line, dict(zip(names, row, strict=True))


def header(piece: Piece, delimiter: str | None = None) -> list[str]:
    """Return the names of the columns of a file. Raises UserError if the first line does not give them."""
    line, row = next(_rows(piece, delimiter), (1, []))
    if not isinstance(row, list) or not row or len(set(row)) < len(row):
        problem = (
            row
            if isinstance(row, Exception)
            else f"names {max(row, key=row.count)!r} twice"
            if row
            else "there is none"
        )
        raise UserError(
            f"{piece.path}:{line}: the first line must name the columns ({problem}); give each column a name"
        )
    return row


def _rows(piece: Piece, delimiter: str | None) -> Iterator[tuple[int, list[str] | csv.Error | files.CorruptFileError]]:
    """Yield the rows of a file but for empty ones, each with the line on which it starts, or why it cannot be read."""
    kind = piece.path.removesuffix(files.compression_suffix(piece.path) or "")
    csv.field_size_limit(files.MAX_LINE_BYTES)
    with files.open_piece(piece) as file:
        rows = csv.reader(
            _lines(file, piece.path), delimiter=delimiter or ("\t" if kind.endswith(".tsv") else ","), strict=True
        )
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, error
            except files.CorruptFileError as problem:
                yield line, problem
                return
            else:
                if row:
                    yield line, row


def _lines(file: BinaryIO, path: str) -> Iterator[str]:
    for number, line in enumerate(files.lines(files.block_reader(file, path))):
        text = BAD if line is None else line.decode(errors="surrogateescape")
        yield (text.removeprefix("\ufeff") if number == 0 else text) + "\n"


def _is_text(field: str) -> bool:
    try:
        field.encode()
    except UnicodeEncodeError:
        return False
    return True
