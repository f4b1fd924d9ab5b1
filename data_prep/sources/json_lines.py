"""JSON lines: one object a line, with named columns or the `messages` form of chat data sets."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from data_prep.config import JsonSource
from data_prep.sources import files
from data_prep.sources.record import Piece, Record
from data_prep.sources.views import chat_columns, make_mapping

SUFFIXES = tuple(kind + (packed or "") for kind in (".json", ".jsonl", ".ndjson") for packed in files.OPEN)
SCAN: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # not in the stubs
BOM = "\ufeff"
LONGEST_INTEGER = sys.int_info.str_digits_check_threshold
"""Digits that Python reads whatever limit is set."""


class JsonLines:
    """Files of JSON lines; the plain ones are cut into byte ranges, and a line belongs to the range in which it starts."""

    def __init__(self, source: JsonSource, views: tuple[str, ...], name: str):
        self.files, self.note = files.find_and_note(source, name, SUFFIXES)
        self.mapping = make_mapping(source, views, name, {view: view for view in views})
        self.chat = make_mapping(source, views, name, chat_columns(views)) if len(views) > 1 else self.mapping
        self.supplies = self.mapping.supplies

    def pieces(self) -> list[Piece]:
        """Cut the source, see `Reader.pieces`."""
        return files.byte_pieces(self.files)

    def read(self, piece: Piece) -> Iterator[Record]:
        """Read a piece, see `Reader.read`."""
        number = 0
        with files.opened(piece) as file:
            read = files.reads_of(file, piece.path)
            packed = files.codec_of(piece.path) is not None
            found = files.lines(read) if packed else files.lines(read, piece.stop - files.skip_to_line(file, piece.start))
            try:
                for number, line in enumerate(found, start=1):
                    if line is None:
                        yield Record(None, number, "a line of more than 16 MiB")
                    elif line and not line.isspace():
                        yield from self._records(line, number)
            except files.Damaged as problem:
                yield Record(None, number + 1, str(problem), "damaged")

    def count(self, piece: Piece) -> int:
        """Count positions, see `Reader.count`."""
        return 0 if files.is_whole(piece) else files.count_lines(piece)

    def place(self, piece: Piece, position: int, before: int) -> str:
        """Describe a place, see `Reader.place`."""
        return f"{piece.path}:{before + position}"

    def _records(self, line: bytes, number: int) -> Iterable[Record]:
        try:
            value = parse(line)
        except UnicodeDecodeError as error:
            return [Record(None, number, f"not UTF-8 ({error.reason} at byte {error.start} of the line)")]
        except (ValueError, RecursionError) as error:
            return [Record(None, number, f"not JSON ({error})")]
        if not isinstance(value, dict):
            return [Record(None, number, f"a JSON {type(value).__name__}, not an object")]
        mapping = self.chat if value.get("messages") is not None else self.mapping
        return mapping.records(value, number)


def parse(line: bytes) -> Any:
    """Return the JSON value of a line. Raises ValueError (UnicodeDecodeError where it is not UTF-8) or RecursionError."""
    text = line.decode().strip(" \t\r\n")
    try:
        value, end = SCAN(text, 0)  # `json.loads` without its detours
        if end == len(text):
            return value
    except json.JSONDecodeError:
        raise
    except (StopIteration, ValueError):  # a ValueError is about an integer of more digits than Python reads
        pass
    return json.loads(text.removeprefix(BOM), parse_int=_number)


def _number(digits: str) -> int | float:
    """Return an integer, or a float if Python limits how many digits of an integer it reads."""
    return int(digits) if len(digits) <= LONGEST_INTEGER else float(digits)
