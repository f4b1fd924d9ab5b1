"""CSV and TSV files: a header line with the column names, then one record per row."""

import csv
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

from data_prep.config import FileSource
from data_prep.sources import files
from data_prep.sources.record import Piece, Record
from data_prep.sources.views import ViewMapping, column_mapping
from data_prep.utils.console import UserError

SUFFIXES = tuple(kind + (compression or "") for kind in (".csv", ".tsv") for compression in files.OPENERS)
TOO_LONG_LINE = "\udcff"
"""Placeholder for a line of more than 16 MiB: a lone surrogate, like the ones that replace bytes that are not UTF-8."""

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
"""Usual delimiters, in words."""
EXAMINED = 100
"""Number of rows by which a wrong delimiter is recognised."""
HEADER_BYTES = 1000
"""Number of bytes at the beginning of a file by which UTF-16 is recognised."""
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""First bytes of a UTF-16 file."""
CARRIAGE_RETURN = "new-line character seen in unquoted field"
"""Beginning of the error for a carriage return that is followed by text."""
LINE_ENDS = "a carriage return (CR) without a line feed"
TO_LINE_FEEDS = "convert the file with tr '\\r' '\\n' < FILE > NEW"
UNCLOSED = "a quote is not closed, so the rest of the file is one field"
"""Explanation of the error at the end of a file."""


class Csv:
    """Reader of CSV and TSV files. A file is one piece, because quotes can only be matched from its beginning."""

    def __init__(
        self,
        source: FileSource,
        views: tuple[str, ...],
        name: str,
        paths: list[str] | None = None,
        delimiter: str | None = None,
    ):
        self.delimiter = delimiter
        self.files, self.note = files.find_files_with_note(source, name, SUFFIXES) if paths is None else (paths, "")
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
        """Divide the source into pieces; see `Reader.pieces`."""
        sizes = {path: files.size_of(path) for path in self.files}
        return [Piece(path, 0, size, size) for path, size in sizes.items()]

    def read(self, piece: Piece) -> Iterator[Record]:
        """Read a piece; see `Reader.read`. A position is the line on which a row starts."""
        mapping = self.mappings[piece.path]
        for line, row in read_objects(piece, self.delimiter):
            if isinstance(row, files.CorruptFileError):
                yield Record(None, line, str(row), "damaged")
            elif isinstance(row, ValueError):
                yield Record(None, line, str(row))
            else:
                yield from mapping.records(row, line)

    def count(self, piece: Piece) -> int:
        """Count positions; see `Reader.count`."""
        return 0

    def place(self, piece: Piece, position: int, before: int) -> str:
        """Return the location of a record; see `Reader.place`."""
        return f"{piece.path}:{before + position}"


def read_objects(
    piece: Piece, delimiter: str | None = None
) -> Iterator[tuple[int, dict[str, str] | ValueError | files.CorruptFileError]]:
    """Yield the line on which each row of a file starts, and the row by column name or the error of reading it."""
    names, rows = header(piece, delimiter), _rows(piece, delimiter)
    next(rows)
    for line, row in rows:
        if isinstance(row, files.CorruptFileError):
            yield line, row
        elif isinstance(row, csv.Error):
            yield line, ValueError(f"not CSV ({_described(row)})")
        elif len(row) != len(names):
            yield line, ValueError(f"{len(row)} fields, but the header has {len(names)}")
        elif any(not field.isascii() and not _is_text(field) for field in row):
            yield line, ValueError("not UTF-8, or a line of more than 16 MiB")
        else:
            yield line, dict(zip(names, row, strict=True))


def header(piece: Piece, delimiter: str | None = None) -> list[str]:
    """Return the column names of a file. Raises UserError if the first line does not contain them."""
    line, row = next(_rows(piece, delimiter), (1, []))
    _check_encoding(piece, line, row)
    if not isinstance(row, list) or not row or len(set(row)) < len(row):
        problem: object = "it is empty"
        if isinstance(row, Exception):
            problem = row
        elif row:
            problem = f"it names {max(row, key=row.count)!r} twice"
        raise UserError(
            f"{piece.path}:{line}: the first line must name the columns ({problem}): give each column a different name"
        )
    if len(row) == 1 and (other := _other_delimiter(piece, delimiter)) is not None:
        used = _delimiter_of(piece, delimiter)
        suffix = {("\t", ","): ".tsv", (",", "\t"): ".csv"}.get((other, used))
        remedy = f"rename the file to end in {suffix}" if suffix else f"write {DELIMITERS.get(used, used)} between them"
        raise UserError(
            f"{piece.path}:{line}: the columns are divided by {DELIMITERS[other]}, but the reader expects "
            f"{DELIMITERS.get(used, repr(used))}: {remedy}, or convert it to JSON lines"
        )
    return row


def _check_encoding(piece: Piece, line: int, row: list[str] | csv.Error | files.CorruptFileError) -> None:
    """Raise UserError if the encoding or the line ends of a file are not the expected ones, by its header."""
    if isinstance(row, files.CorruptFileError):
        return
    problem, remedy = "", files.TO_UTF_8
    if isinstance(row, csv.Error):
        problem, remedy = (LINE_ENDS, TO_LINE_FEEDS) if CARRIAGE_RETURN in str(row) else ("", "")
    elif not all(_is_text(name) and "\0" not in name for name in row):
        problem = "the names of the columns are not UTF-8"
    if not problem:
        return
    with files.open_piece(piece) as file:
        start = files.block_reader(file, piece.path)()[:HEADER_BYTES]
    if start[:2] in UTF_16 or b"\0" in start:
        problem, remedy = "UTF-16, not UTF-8", files.TO_UTF_8.replace("ENCODING", "UTF-16").partition(";")[0]
    raise UserError(f"{piece.path}:{line}: {problem}: {remedy}")


def _other_delimiter(piece: Piece, delimiter: str | None) -> str | None:
    """Return the delimiter that divides the header and most of the first rows into equally many columns, if any."""
    used = _delimiter_of(piece, delimiter)
    for other in DELIMITERS:
        if other == used:
            continue
        first, *others = [row if isinstance(row, list) else [] for _, row in islice(_rows(piece, other), EXAMINED)]
        if len(first) > 1 and 2 * sum(len(row) == len(first) for row in others) > len(others):
            return other
    return None


def _described(error: csv.Error) -> str:
    """Return the problem of a row that is not CSV."""
    if "unexpected end of data" in str(error):
        return f"{error}: {UNCLOSED}"
    return LINE_ENDS if CARRIAGE_RETURN in str(error) else str(error)


def _delimiter_of(piece: Piece, delimiter: str | None) -> str:
    """Return the delimiter of a file: the given one, or the one of its suffix."""
    uncompressed = piece.path.removesuffix(files.compression_suffix(piece.path) or "")
    return delimiter or ("\t" if uncompressed.endswith(".tsv") else ",")


def _rows(piece: Piece, delimiter: str | None) -> Iterator[tuple[int, list[str] | csv.Error | files.CorruptFileError]]:
    """Yield the line on which each non-empty row starts, and the row or the error of reading it."""
    csv.field_size_limit(files.MAX_LINE_BYTES)
    with files.open_piece(piece) as file:
        rows = csv.reader(
            _lines(file, piece.path),
            delimiter=_delimiter_of(piece, delimiter),
            strict=True,
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
        text = TOO_LONG_LINE if line is None else line.decode(errors="surrogateescape")
        yield (text.removeprefix("\ufeff") if number == 0 else text) + "\n"


def _is_text(field: str) -> bool:
    try:
        field.encode()
    except UnicodeEncodeError:
        return False
    return True
