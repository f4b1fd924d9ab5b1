"""Plain documents: one per file, or several per file, separated by blank lines or a separator line."""

import codecs
import re
import sys
from collections.abc import Callable, Iterable, Iterator

from data_prep.config import TextSource
from data_prep.sources import files
from data_prep.sources.record import Piece, Record
from data_prep.sources.views import check_columns, make_mapping

LONGEST_DOCUMENT = 64 << 20
LONGEST_SEPARATOR = 4096
"""Longest separator line without its newline, in bytes; a longer blank line does not separate documents."""
LOOK_BACK = LONGEST_SEPARATOR + 3
"""Largest distance in bytes from the start of a document back to the newline before its last separator line."""
COLUMN = "text"


class Text:
    """Reader of documents. Uncompressed files with separators are divided into byte ranges.

    A document belongs to the range in which it starts.
    """

    def __init__(self, source: TextSource, views: tuple[str, ...], name: str):
        self.files, self.note = files.find_files_with_note(source, name, ("",))
        self.separators = None if source.separator is None else separator_pattern(source.separator)
        self.mapping = make_mapping(source, views, name, {views[-1]: COLUMN})
        check_columns(self.mapping, [COLUMN], "a text source", name)
        self.provided_views = self.mapping.provided_views

    def pieces(self) -> list[Piece]:
        """Divide the source into pieces; see `Reader.pieces`."""
        if self.separators is not None:
            return files.byte_pieces(self.files)
        sizes = {path: files.size_of(path) for path in self.files}
        return [Piece(path, 0, size, size) for path, size in sizes.items() if size or files.compression_suffix(path)]

    def read(self, piece: Piece) -> Iterator[Record]:
        """Read a piece; see `Reader.read`."""
        with files.open_piece(piece) as file:
            cut = self.separators is not None and files.compression_suffix(piece.path) is None
            start, stop = (piece.start, piece.stop) if cut else (0, sys.maxsize)
            read_from = max(0, start - LOOK_BACK)
            if read_from:
                file.seek(read_from)
            for line, document in Splitter(
                files.block_reader(file, piece.path), self.separators, read_from, start, stop
            ).documents():
                yield from self._records(line, document)

    def count(self, piece: Piece) -> int:
        """Count positions; see `Reader.count`."""
        return 0 if files.is_complete_file(piece) else files.count_lines(piece)

    def place(self, piece: Piece, position: int, before: int) -> str:
        """Return the location of a record; see `Reader.place`."""
        return f"{piece.path}:{before + position}"

    def _records(self, line: int, document: bytes | str | files.CorruptFileError) -> Iterable[Record]:
        if not isinstance(document, bytes):
            return [Record(None, line, str(document), "malformed" if isinstance(document, str) else "damaged")]
        try:
            text = document.decode()
        except UnicodeDecodeError as error:
            lines_before = document.count(b"\n", 0, error.start)
            return [
                Record(None, line + lines_before, f"not UTF-8 ({error.reason} at byte {error.start} of the document)")
            ]
        return self.mapping.records({COLUMN: text}, line) if text and not text.isspace() else []


def separator_pattern(separator: str) -> re.Pattern[bytes]:
    """Return a pattern for a run of separator lines.

    A match starts at the newline in front of the first one and ends after the newline of the last one.
    """
    line = rb"[ \t\r\v\f]{0,%d}+" % LONGEST_SEPARATOR if not separator else re.escape(separator.encode()) + rb"\r?"
    return re.compile(rb"\n(?:" + line + rb"\n)++")


class Splitter:
    """Splitter of bytes into documents: those whose first line starts in the byte range [start, stop) of a file.

    Each call of `read` returns the next block of the file; the first block starts at position `read_from`.
    """

    def __init__(
        self, read: Callable[[], bytes], separators: re.Pattern[bytes] | None, read_from: int, start: int, stop: int
    ):
        self.read, self.separators, self.start, self.stop = read, separators, start, stop
        # Between blocks, `data` is empty or starts with the newline in front of a possible separator line; one is added
        # at the start of the file. `data_start` is the position of data[0] in the file.
        self.data, self.data_start = (b"\n", -1) if read_from == 0 else (b"", read_from)
        self.counted_to = max(start - 1, 0)  # position up to which lines are counted
        self.lines = int(start == 0)  # number of lines that start in the range up to there
        self.parts: list[bytes] = []  # bytes of the current document in front of `data`
        self.size = 0  # bytes in `parts`
        self.doc_start = self.line = 0  # position and line of the document's first byte
        self.in_piece = False  # whether the document starts in this piece
        if read_from == 0:
            self._start_document(0)

    def documents(self) -> Iterator[tuple[int, bytes | str | files.CorruptFileError]]:
        """Yield the line number of each document, from 1 in the piece, and its bytes or the error from reading it."""
        try:
            while block := self.read():
                if self.data_start == -1 and self.data == b"\n" and block.startswith(codecs.BOM_UTF8):
                    # Skip the byte order mark: the document starts at byte 3, and the added newline takes the place of
                    # byte 2.
                    block, self.data_start, self.doc_start, self.counted_to = block[3:], 2, 3, max(self.counted_to, 3)
                self.data += block
                if self.separators is not None:
                    for match in self.separators.finditer(self.data):
                        if document := self._end_document(match.start()):
                            yield self.line, document
                        self._start_document(self.data_start + match.end())
                if not self.in_piece and self.data_start + len(self.data) >= self.stop:
                    return
                self._discard_processed()
        except files.CorruptFileError as problem:
            yield self.line, problem
            return
        # The file may end with a separator that lacks its newline.
        if self.separators is not None and self.separators.fullmatch(self.data + b"\n"):
            self.data = self.data[:1]
        ended = self.data.endswith(b"\n")
        if document := self._end_document(len(self.data) - ended, ended):
            yield self.line, document

    def _start_document(self, position: int) -> None:
        """Start a document at a position that is the start of a line."""
        self.doc_start, self.size = position, 0
        if self.parts:
            self.parts = []
        self.in_piece = self.start <= position < self.stop
        if self.in_piece:
            self._count_lines_to(position)
            self.line = self.lines

    def _count_lines_to(self, position: int) -> None:
        if position > self.counted_to:
            self.lines += self.data.count(b"\n", self.counted_to - self.data_start, position - self.data_start)
            self.counted_to = position

    def _end_document(self, end: int, newline: bool = True) -> bytes | str:
        """Return the current document, b"" if it belongs to a different piece, or an error if it is too long.

        The document ends in front of data[end]. If `newline` is true, a newline follows it.
        """
        if not self.in_piece:
            return b""
        document = self.data[max(self.doc_start - self.data_start, 0) : end]
        if self.size + len(document) <= LONGEST_DOCUMENT + 1:  # plus one byte for its newline
            if self.parts:
                document = b"".join(self.parts) + document
            if newline and document.endswith(b"\r"):
                document = document[:-1]
            if len(document) <= LONGEST_DOCUMENT:
                return document
        return f"a document of more than {LONGEST_DOCUMENT >> 20} MiB; split it with `separator`"

    def _discard_processed(self) -> None:
        """Keep only the last line of `data`, if it may become a separator; the rest belongs to the current document."""
        last = self.data.rfind(b"\n")
        cut = len(self.data) if last < 0 or len(self.data) - last > LOOK_BACK else last
        self._count_lines_to(self.data_start + cut)
        if self.in_piece:
            part = self.data[max(self.doc_start - self.data_start, 0) : cut]
            self.size += len(part)
            if self.size <= LONGEST_DOCUMENT + 1:  # a longer document is an error
                self.parts.append(part)
        self.data, self.data_start = self.data[cut:], self.data_start + cut
