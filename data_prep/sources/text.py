"""Plain documents: a file each, or several in a file with blank lines or a separator line between them."""

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
"""Bytes of a separator line without its newline; blank lines longer than this do not separate."""
LOOK_BACK = LONGEST_SEPARATOR + 3
"""From the start of a document, this far back stands the newline before its separator."""
COLUMN = "text"


class Text:
    """Files of documents. Plain ones with separators are cut into byte ranges; a document belongs to the range in which it starts."""

    def __init__(self, source: TextSource, views: tuple[str, ...], name: str):
        self.files, self.note = files.find_files_with_note(source, name, ("",))
        self.separators = None if source.separator is None else separator_pattern(source.separator)
        self.mapping = make_mapping(source, views, name, {views[-1]: COLUMN})
        check_columns(self.mapping, [COLUMN], "a text source", name)
        self.provided_views = self.mapping.provided_views

    def pieces(self) -> list[Piece]:
        """Cut the source, see `Reader.pieces`."""
        if self.separators is not None:
            return files.byte_pieces(self.files)
        sizes = {path: files.size_of(path) for path in self.files}
        return [Piece(path, 0, size, size) for path, size in sizes.items() if size or files.compression_suffix(path)]

    def read(self, piece: Piece) -> Iterator[Record]:
        """Read a piece, see `Reader.read`."""
        with files.open_piece(piece) as file:
            cut = self.separators is not None and files.compression_suffix(piece.path) is None
            start, stop = (piece.start, piece.stop) if cut else (0, sys.maxsize)
            begin = max(0, start - LOOK_BACK)
            if begin:
                file.seek(begin)
            for line, document in Splitter(
                files.block_reader(file, piece.path), self.separators, begin, start, stop
            ).documents():
                yield from self._records(line, document)

    def count(self, piece: Piece) -> int:
        """Count positions, see `Reader.count`."""
        return 0 if files.is_complete_file(piece) else files.count_lines(piece)

    def place(self, piece: Piece, position: int, before: int) -> str:
        """Describe a place, see `Reader.place`."""
        return f"{piece.path}:{before + position}"

    def _records(self, line: int, document: bytes | str | files.CorruptFileError) -> Iterable[Record]:
        if not isinstance(document, bytes):
            return [Record(None, line, str(document), "malformed" if isinstance(document, str) else "damaged")]
        try:
            text = document.decode()
        except UnicodeDecodeError as error:
            within = document.count(b"\n", 0, error.start)
            return [Record(None, line + within, f"not UTF-8 ({error.reason} at byte {error.start} of the document)")]
        return self.mapping.records({COLUMN: text}, line) if text and not text.isspace() else []


def separator_pattern(separator: str) -> re.Pattern[bytes]:
    """Runs of separator lines, from the newline before the first to the newline of the last."""
    line = rb"[ \t\r\v\f]{0,%d}+" % LONGEST_SEPARATOR if not separator else re.escape(separator.encode()) + rb"\r?"
    return re.compile(rb"\n(?:" + line + rb"\n)++")


class Splitter:
    """Cuts bytes, read from place `begin` of a file on, into the documents whose first line starts at `start` to `stop`."""

    def __init__(
        self, read: Callable[[], bytes], separators: re.Pattern[bytes] | None, begin: int, start: int, stop: int
    ):
        self.read, self.separators, self.start, self.stop = read, separators, start, stop
        # `data` starts with the newline before a line that may be a separator; before the first line of the file one is made up
        self.data, self.at = (b"\n", -1) if begin == 0 else (b"", begin)  # at: place of data[0]
        self.counted, self.lines = max(start - 1, 0), int(start == 0)  # lines counted up to this place
        self.parts: list[bytes] = []  # of the document at hand, before `data`
        self.size = 0
        self.first = self.line = 0  # place and line of its first byte
        self.wanted = False  # it starts in this piece
        if begin == 0:
            self._start(0)

    def documents(self) -> Iterator[tuple[int, bytes | str | files.CorruptFileError]]:
        """The line of each document, from 1 at the first line of the piece, and its bytes or why there are none."""
        try:
            while block := self.read():
                if self.at == -1 and self.data == b"\n" and block.startswith(codecs.BOM_UTF8):
                    block, self.at, self.first, self.counted = block[3:], 2, 3, max(self.counted, 3)
                self.data += block
                if self.separators is not None:
                    for match in self.separators.finditer(self.data):
                        if document := self._ending_at(match.start()):
                            yield self.line, document
                        self._start(self.at + match.end())
                if not self.wanted and self.at + len(self.data) >= self.stop:
                    return
                self._move_on()
        except files.CorruptFileError as problem:
            yield self.line, problem
            return
        if self.separators is not None and self.separators.fullmatch(self.data + b"\n"):
            self.data = self.data[:1]
        ended = self.data.endswith(b"\n")
        if document := self._ending_at(len(self.data) - ended, ended):
            yield self.line, document

    def _start(self, place: int) -> None:
        """A document starts at this place, where a line does."""
        self.first, self.size = place, 0
        if self.parts:
            self.parts = []
        self.wanted = self.start <= place < self.stop
        if self.wanted:
            self._count(place)
            self.line = self.lines

    def _count(self, place: int) -> None:
        if place > self.counted:
            self.lines += self.data.count(b"\n", self.counted - self.at, place - self.at)
            self.counted = place

    def _ending_at(self, end: int, newline: bool = True) -> bytes | str:
        """The document at hand, which ends before data[end], its newline if it has one; nothing where it is another piece's."""
        if not self.wanted:
            return b""
        document = self.data[max(self.first - self.at, 0) : end]
        if self.size + len(document) <= LONGEST_DOCUMENT + 1:  # the byte more may be that of its newline
            if self.parts:
                document = b"".join(self.parts) + document
            if newline and document.endswith(b"\r"):
                document = document[:-1]
            if len(document) <= LONGEST_DOCUMENT:
                return document
        return f"a document of more than {LONGEST_DOCUMENT >> 20} MiB; cut it with `separator`"

    def _move_on(self) -> None:
        """Keep of `data` only the last line, if it may become a separator; the rest belongs to the document at hand."""
        last = self.data.rfind(b"\n")
        cut = len(self.data) if last < 0 or len(self.data) - last > LOOK_BACK else last
        self._count(self.at + cut)
        if self.wanted:
            part = self.data[max(self.first - self.at, 0) : cut]
            self.size += len(part)
            if self.size <= LONGEST_DOCUMENT + 1:  # a longer one is refused
                self.parts.append(part)
        self.data, self.at = self.data[cut:], self.at + cut
