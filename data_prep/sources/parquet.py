"""Parquet files, cut into row groups."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.config import ParquetSource
from data_prep.console import UserError
from data_prep.sources import files
from data_prep.sources.record import Piece, Record
from data_prep.sources.views import Mapping, column_mapping

BATCH_ROWS = 1024


class Parquet:
    """Files of rows; small row groups share a piece."""

    def __init__(self, source: ParquetSource, views: tuple[str, ...], name: str):
        self.files, self.note = files.find_and_note(source, name, (".parquet",))
        self.mappings = {}
        self.sizes: dict[str, list[int]] = {}
        """Bytes on disk of the row groups of each file."""
        for path in self.files:
            with opened(path) as file:
                self.mappings[path] = column_mapping(source, views, file.schema_arrow.names, path, name)
                groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
                self.sizes[path] = [sum(group.column(index).total_compressed_size for index in range(group.num_columns)) for group in groups]
        self.supplies = tuple(map(any, zip(*(mapping.supplies for mapping in self.mappings.values()), strict=True)))

    def pieces(self) -> list[Piece]:
        """Cut the source, see `Reader.pieces`."""
        smallest = files.piece_length(sum(map(sum, self.sizes.values())))
        pieces = []
        for path, sizes in self.sizes.items():
            start, total = 0, 0
            for stop, size in enumerate(sizes, start=1):
                total += size
                if total >= smallest or stop == len(sizes):
                    pieces.append(Piece(path, start, stop, total))
                    start, total = stop, 0
        return pieces

    def read(self, piece: Piece) -> Iterator[Record]:
        """Read a piece, see `Reader.read`."""
        mapping, before = self.mappings[piece.path], 0
        with opened(piece.path) as file:
            for batch in file.iter_batches(BATCH_ROWS, range(piece.start, piece.stop), mapping.columns, use_threads=False):
                yield from records(batch, mapping, before)
                before += batch.num_rows

    def count(self, piece: Piece) -> int:
        """Count positions, see `Reader.count`."""
        if piece.stop - piece.start == len(self.sizes[piece.path]):
            return 0
        with opened(piece.path) as file:
            return sum(file.metadata.row_group(group).num_rows for group in range(piece.start, piece.stop))

    def place(self, piece: Piece, position: int, before: int) -> str:
        """Describe a place, see `Reader.place`."""
        return f"{piece.path}:{before + position}"


@contextmanager
def opened(path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file. Raises UserError where it cannot be read."""
    try:
        status = os.stat(path)
        with pq.ParquetFile(path, page_checksum_verification=True, metadata=_metadata(path, status.st_size, status.st_mtime_ns)) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise files.cannot_read(path, error) from None
        raise UserError(f"{path} is no Parquet file, or damaged ({' '.join(str(error).split())[:200]}); replace it") from None


@lru_cache(maxsize=4)
def _metadata(path: str, size: int, changed: int) -> pq.FileMetaData:
    """The footer of a file, which takes long where there are thousands of row groups."""
    return pq.read_metadata(path)


class Unreadable(str):
    """Stands in for a value that Python cannot hold, such as bytes that are not UTF-8: why not, in one line."""


def records(batch: pa.RecordBatch, mapping: Mapping, before: int) -> Iterator[Record]:
    """Yield the records of a batch, `before` rows after the first row of its piece. A row with an unreadable value is malformed."""
    names, columns = batch.schema.names, [_values(column) for column in batch.columns]
    unreadable = {row: f"{name!r} holds {value}, not text" for name, column in zip(names, columns, strict=True)
                  for row, value in enumerate(column) if value.__class__ is Unreadable}
    for row, values in enumerate(zip(*columns, strict=True)):
        position = before + row + 1
        if row in unreadable:
            yield Record(None, position, unreadable[row])
        else:
            yield from mapping.records(dict(zip(names, values, strict=True)), position)


def _values(column: pa.Array) -> list[Any]:
    """Return the values of a column as Python has them: bytes of UTF-8 as text, and Unreadable for what Python cannot hold."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            values: list[Any] = column.to_numpy(zero_copy_only=False).tolist()  # the fastest way
            return values
        values = column.to_pylist()
        return [_decoded(value) for value in values] if _has_bytes(column.type) else values
    except (ValueError, OverflowError, pa.ArrowException):  # UnicodeDecodeError is a ValueError
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return _decoded(scalar.as_py())
    except UnicodeDecodeError:
        return Unreadable("bytes that are not UTF-8")
    except (ValueError, OverflowError, pa.ArrowException) as error:  # a time that Python's types do not reach
        return Unreadable(f"a value of type {scalar.type} that cannot be read ({' '.join(str(error).split())[:100]})")


def _has_bytes(kind: pa.DataType) -> bool:
    """Return whether a type is bytes without the UTF-8 annotation, as Impala and old Spark write text, or contains such bytes."""
    tests = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary
    return any(test(kind) for test in tests) or any(_has_bytes(kind.field(index).type) for index in range(kind.num_fields))


def _decoded(value: Any) -> Any:
    """Return a value with all bytes in it as text. Raises UnicodeDecodeError."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [_decoded(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _decoded(entry) for key, entry in value.items()}
    return value
