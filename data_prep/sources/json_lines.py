"""JSON lines: one object per line, with named columns or a conversation."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from data_prep.config import FileSource
from data_prep.sources import files, json_array
from data_prep.sources.json_array import BOM, SCAN, read_integer
from data_prep.sources.record import Piece, Record
from data_prep.sources.views import RowMapping

SUFFIXES = tuple(kind + (compression or "") for kind in (".json", ".jsonl", ".ndjson") for compression in files.OPENERS)


class JsonLines:
    """Reader of JSON lines. A .json file may also be one array of objects, which is one piece.

    Uncompressed files are divided into byte ranges, and a line belongs to the range in which it starts.
    """

    def __init__(self, source: FileSource, views: tuple[str, ...], name: str, paths: list[str] | None = None):
        self.files, self.note = files.find_files_with_note(source, name, SUFFIXES) if paths is None else (paths, "")
        self.arrays = set(filter(json_array.is_array, self.files))
        self.mapping = RowMapping(source, views, name)
        self.provided_views = self.mapping.columns.provided_views

    def pieces(self) -> list[Piece]:
        """Divide the source into pieces; see `Reader.pieces`."""
        return files.byte_pieces(self.files, self.arrays)

    def read(self, piece: Piece) -> Iterator[Record]:
        """Read a piece; see `Reader.read`."""
        if piece.path in self.arrays:
            yield from self._elements(piece)
            return
        number = 0
        with files.open_piece(piece) as file:
            read = files.block_reader(file, piece.path)
            compressed = files.compression_suffix(piece.path) is not None
            lines = (
                files.lines(read)
                if compressed
                else files.lines(read, piece.stop - files.skip_to_line(file, piece.start))
            )
            try:
                for number, line in enumerate(lines, start=1):
                    if line is None:
                        yield Record(None, number, "a line of more than 16 MiB")
                    elif line and not line.isspace():
                        yield from self._records_of_line(line, number)
            except files.CorruptFileError as problem:
                yield Record(None, number + 1, str(problem), "damaged")

    def count(self, piece: Piece) -> int:
        """Count positions; see `Reader.count`."""
        return 0 if piece.path in self.arrays or files.is_complete_file(piece) else files.count_lines(piece)

    def place(self, piece: Piece, position: int, before: int) -> str:
        """Return the location of a record; see `Reader.place`."""
        return f"{piece.path}, element {position}" if piece.path in self.arrays else f"{piece.path}:{before + position}"

    def _elements(self, piece: Piece) -> Iterator[Record]:
        """Yield the records of a file that is one array; a position is the number of an element."""
        with files.open_piece(piece) as file:
            for number, value in enumerate(json_array.elements(files.block_reader(file, piece.path)), start=1):
                if isinstance(value, files.CorruptFileError):
                    yield Record(None, number, str(value), "damaged")
                elif isinstance(value, ValueError):
                    yield Record(None, number, str(value))
                else:
                    yield from self._records_of_value(value, number)

    def _records_of_line(self, line: bytes, number: int) -> Iterable[Record]:
        try:
            value = parse(line)
        except UnicodeDecodeError as error:
            return [Record(None, number, f"not UTF-8 ({error.reason} at byte {error.start} of the line)")]
        except (ValueError, RecursionError) as error:
            return [Record(None, number, f"not JSON ({error})")]
        return self._records_of_value(value, number)

    def _records_of_value(self, value: Any, number: int) -> Iterable[Record]:
        if not isinstance(value, dict):
            return [Record(None, number, f"a value of type {type(value).__name__}, not a JSON object")]
        return self.mapping.of(value).records(value, number)


def parse(line: bytes) -> Any:
    """Return the JSON value of a line.

    Raises ValueError if it is not valid JSON, and RecursionError if it is nested too deeply. The ValueError is a
    UnicodeDecodeError if the line is not UTF-8.
    """
    text = line.decode().strip(" \t\r\n")
    try:
        value, end = SCAN(text, 0)  # faster than `json.loads`
        if end == len(text):
            return value
    except json.JSONDecodeError:
        raise
    except (StopIteration, ValueError):
        # There is a BOM or something else instead of a value, or an integer has more digits than Python reads.
        pass
    return json.loads(text.removeprefix(BOM), parse_int=read_integer)
