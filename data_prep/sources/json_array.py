"""A .json file that is one array, read element by element in bounded memory."""

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from data_prep.sources import files
from data_prep.sources.record import Piece

SUFFIXES = tuple(".json" + (compression or "") for compression in files.OPENERS)
LOST = "the rest of the array is lost: fix the file"
NOT_UTF_8 = re.compile("[\udc80-\udcff]")
"""Characters that Python substitutes for bytes that are not UTF-8."""
BLANK = " \t\r\n"
BOM = "\ufeff"
LONGEST_INTEGER = sys.int_info.str_digits_check_threshold
"""Number of digits that Python always reads, whatever limit is set."""
Scan = Callable[[str, int], tuple[Any, int]]
SCAN: Scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # not in the stubs


def read_integer(digits: str) -> int | str:
    """Return an integer, or its digits if there are more than Python may read."""
    return int(digits) if len(digits) <= LONGEST_INTEGER else digits


SCAN_ANY_INTEGER: Scan = json.JSONDecoder(parse_int=read_integer).scan_once  # type: ignore[attr-defined]


def is_array(path: str) -> bool:
    """Return whether a file is named .json and starts with a bracket. Raises UserError if it cannot be read."""
    if not path.endswith(SUFFIXES):
        return False
    size = files.size_of(path)
    start = first = b""
    with files.open_piece(Piece(path, 0, size, size)) as file:
        read = files.block_reader(file, path)
        try:
            while (len(start) < len(codecs.BOM_UTF8) or not first) and (block := read()):
                start += block
                first = start.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        except files.CorruptFileError:
            return False  # reading the file reports the error
    return first == b"["


def elements(read: Callable[[], bytes]) -> Iterator[Any]:
    """Yield the elements of an array, and a ValueError for an element that is not UTF-8.

    The last item is a CorruptFileError if the rest of the file cannot be read.
    """
    text = _Text(read)
    try:
        text.expect(BOM)
        text.expect("[")
        has_next = not text.expect("]")
        while has_next:
            yield text.value()
            has_next = text.expect(",")
            if not has_next and not text.expect("]"):
                raise ValueError("no comma and no closing bracket after an element")
        if text.skip_blanks():
            raise ValueError("text after the closing bracket")
    except files.CorruptFileError as problem:
        yield problem
    except json.JSONDecodeError as error:
        yield files.CorruptFileError(f"not JSON ({error.msg}, line {text.line_of(error.pos)}); {LOST}")
    except (ValueError, RecursionError) as error:
        yield files.CorruptFileError(f"not JSON ({error}, line {text.line_of(text.at)}); {LOST}")


class _Text:
    """Decoder of the text of a file. Its methods raise CorruptFileError, ValueError and RecursionError."""

    def __init__(self, read: Callable[[], bytes]):
        self.read, self.decoder = read, codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.held, self.at, self.ended = "", 0, False
        self.before = 1
        """Line on which the held text starts."""

    def line_of(self, position: int) -> int:
        """Return the line of a position in the held text."""
        return self.before + self.held.count("\n", 0, position)

    def expect(self, character: str) -> bool:
        """Return whether `character` is next; if so, move past it and the blanks around it."""
        is_next = self.skip_blanks().startswith(character)
        if is_next:
            self.at += 1
            self.skip_blanks()
        return is_next

    def skip_blanks(self) -> str:
        """Move past blanks, and return the next character, or "" at the end of the file."""
        while True:
            while self.at < len(self.held) and self.held[self.at] in BLANK:
                self.at += 1
            if self.at < len(self.held) or not self._more():
                return self.held[self.at : self.at + 1]

    def value(self) -> Any:
        """Return the value at the current position, and move past it."""
        scan = SCAN
        while True:
            try:
                value, end = scan(self.held, self.at)
            except (StopIteration, json.JSONDecodeError) as error:  # the held text may end within the value
                if not self._more():
                    raise error if isinstance(error, ValueError) else ValueError("no value after a comma") from None
            except ValueError:  # an integer has more digits than Python reads
                scan = SCAN_ANY_INTEGER
            else:
                element, self.at = self.held[self.at : end], end
                return value if element.isascii() or not NOT_UTF_8.search(element) else ValueError("not UTF-8")

    def _more(self) -> bool:
        """Drop the text before the current position, at least double the remainder, and return whether it grew."""
        if len(self.held) - self.at > files.MAX_LINE_BYTES:
            raise ValueError("an element of more than 16 MiB")
        self.before = self.line_of(self.at)
        parts = [self.held[self.at :]]
        wanted, size = max(1, len(parts[0])), 0
        while size < wanted and not self.ended:
            block = self.read()
            self.ended = not block
            parts.append(self.decoder.decode(block, final=self.ended))
            size += len(parts[-1])
        self.held, self.at = "".join(parts), 0
        return size > 0
