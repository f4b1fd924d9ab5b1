"""JSON lines: one object a line, with named columns or the `messages` form of chat data sets."""

import json
import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any, BinaryIO

from data_prep.config import JsonSource
from data_prep.console import UserError
from data_prep.sources.record import Record

UNIT_BYTES = 8 << 20


class JsonLines:
    """A file of JSON lines, cut into byte ranges; a line belongs to the range in which it starts."""

    def __init__(self, source: JsonSource, views: tuple[str, ...], name: str):
        if source.path is None:
            raise UserError(f"{name}.path is not set: give the file on the command line, {name}.path=FILE")
        if source.views is not None and set(source.views) != set(views):
            raise UserError(f"{name}.views names {sorted(source.views)}, but data.views are {list(views)}")
        self.path, self.views = source.path, views
        self.columns = [source.views[view] for view in views] if source.views else None
        try:
            with open(self.path, "rb"):
                self.size = os.path.getsize(self.path)
        except OSError as error:
            raise UserError(f"cannot read {self.path} ({name}.path): {error.strerror}") from None

    def units(self) -> list[tuple[int, int]]:
        return [(start, min(start + UNIT_BYTES, self.size)) for start in range(0, self.size, UNIT_BYTES)]

    def read(self, start: int, stop: int) -> Iterator[Record]:
        with open(self.path, "rb") as file:
            self._skip_to_first_line(file, start)
            line_of_unit = 0
            while file.tell() < stop and (line := file.readline()):
                line_of_unit += 1
                if line.strip():
                    yield self._record(line, line_of_unit)

    def _skip_to_first_line(self, file: BinaryIO, start: int) -> None:
        if start:
            file.seek(start - 1)
            file.readline()  # the rest of the line of the unit before, or just the newline that ends it

    def where(self, start: int, position: int) -> str:
        """`file:line` of a record. Counts the lines before it, so ask for few."""
        lines = 0
        with open(self.path, "rb") as file:
            self._skip_to_first_line(file, start)
            remaining = file.tell()
            file.seek(0)
            while remaining > 0 and (chunk := file.read(min(remaining, 1 << 20))):
                lines += chunk.count(b"\n")
                remaining -= len(chunk)
        return f"{self.path}:{lines + position}"

    def _record(self, line: bytes, position: int) -> Record:
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            return Record(None, position, f"not UTF-8 ({error.reason} at byte {error.start} of the line)")
        except (ValueError, RecursionError) as error:
            return Record(None, position, f"not JSON ({error})")
        if not isinstance(value, dict):
            return Record(None, position, f"a JSON {type(value).__name__}, not an object")
        try:
            return Record(tuple(_text(value, column) for column in self._columns(value)), position)
        except _NoText as error:
            return Record(None, position, str(error))

    def _columns(self, value: dict[str, Any]) -> list[str]:
        if self.columns is not None:
            return self.columns
        return self._message_columns if "messages" in value and len(self.views) > 1 else list(self.views)

    @cached_property
    def _message_columns(self) -> list[str]:
        return ["messages.user", *self.views[1:-1], "messages.assistant"]


class _NoText(Exception):
    """A view that holds something other than text."""


def _text(value: dict[str, Any], column: str) -> str:
    """The text of a column; empty where it is absent or null. `messages.ROLE` is that role's only message."""
    if column.startswith("messages."):
        role = column.removeprefix("messages.")
        messages = value.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise _NoText("`messages` is no list of objects")
        texts = [message.get("content") for message in messages if message.get("role") == role]
        if len(texts) > 1:
            raise _NoText(f"`messages` has {len(texts)} turns of the {role}, a view holds one")
        text = texts[0] if texts else None
    else:
        text = value.get(column)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise _NoText(f"{column!r} holds a JSON {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _NoText(f"{column!r} holds half a surrogate pair, which is no text") from None
    return text
