"""Records from Arrow batches; Parquet files are read as such batches too."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from data_prep.sources.record import Record
from data_prep.sources.views import ViewMapping


class Unreadable(str):
    """A placeholder for a value that Python cannot hold, such as bytes that are not UTF-8; its text describes it."""


def records(batch: pa.RecordBatch, mapping: ViewMapping, before: int) -> Iterator[Record]:
    """Yield the records of a batch; a row with an unreadable value is malformed.

    The batch starts `before` rows after the first row of its piece.
    """
    for position, row in enumerate(rows(batch), start=before + 1):
        if isinstance(row, Unreadable):
            yield Record(None, position, str(row))
        else:
            yield from mapping.records(row, position)


def rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Unreadable]:
    """Yield the rows of a batch by column name, or a description of the first unreadable value of a row."""
    names, columns = batch.schema.names, [_values(column) for column in batch.columns]
    unreadable = {
        row: Unreadable(f"{name!r} holds {value}")
        for name, column in zip(names, columns, strict=True)
        for row, value in enumerate(column)
        if value.__class__ is Unreadable
    }
    for row, values in enumerate(zip(*columns, strict=True)):
        yield unreadable[row] if row in unreadable else dict(zip(names, values, strict=True))


def cells(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch by column name, with an Unreadable in place of each value that cannot be read."""
    columns = [_values(column) for column in batch.columns]
    yield from (dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True))


def _values(column: pa.Array) -> list[Any]:
    """Return the values of a column as Python objects.

    UTF-8 bytes become text. A value that Python cannot hold becomes Unreadable.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            values: list[Any] = column.to_numpy(zero_copy_only=False).tolist()  # faster than to_pylist
            return values
        values = column.to_pylist()
        return [_decoded(value) for value in values] if _has_bytes(column.type) else values
    except (ValueError, OverflowError, pa.ArrowException):  # UnicodeDecodeError is a ValueError
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return _decoded(scalar.as_py())
    except UnicodeDecodeError:
        return Unreadable("bytes that are not UTF-8 text")
    except (ValueError, OverflowError, pa.ArrowException) as error:  # e.g. a time outside the range of Python's types
        return Unreadable(f"a value of type {scalar.type} that cannot be read ({' '.join(str(error).split())[:100]})")


def _has_bytes(kind: pa.DataType) -> bool:
    """Return whether a type is or contains bytes without the UTF-8 annotation.

    Impala and old versions of Spark write text in this way.
    """
    tests = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary
    return any(test(kind) for test in tests) or any(
        _has_bytes(kind.field(index).type) for index in range(kind.num_fields)
    )


def _decoded(value: Any) -> Any:
    """Return a value with all bytes in it decoded to text. Raises UnicodeDecodeError."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [_decoded(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _decoded(entry) for key, entry in value.items()}
    return value
