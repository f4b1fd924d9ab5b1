"""The unchanged rows of a source, and a sample of them that fits into memory."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.config import ArrowSource, FileSource, HubSource, ParquetSource, PythonSource, Source, TextSource
from data_prep.sources import arrow, csv_rows, files, json_lines, open_source, parquet
from data_prep.sources.arrow_values import Unreadable, cells
from data_prep.sources.hub import as_user_error, open_rows
from data_prep.task_rows import Columns, rows_of_file
from data_prep.utils.console import UserError

MOST_ROWS = 200_000
"""Maximum number of rows in a sample."""
MOST_CHARACTERS = 2**28
"""Maximum number of characters in a sample, approximately."""
ROWS_FOR_SIZE = 1000
"""Number of rows from which the bytes of a row are estimated."""
TEXT_COLUMNS = {"text": ("text",), "python": ("docstring", "code")}
"""Columns of the sources that have no columns in their files, by type of the source."""


@dataclass
class Sample:
    """The first rows of a split."""

    rows: list[Columns] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Locations and reasons of the rows that cannot be read."""
    unclear: dict[int, str] = field(default_factory=dict)
    """Location of each row, by its index in `rows`, in which a value of some column is Unreadable."""
    complete: bool = True
    """Whether the sample has all rows of the split."""
    total: int = 0
    """Number of readable rows of the split, estimated from the sizes of the files if the sample is not complete."""

    @property
    def unreadable(self) -> float:
        """Fraction of the rows that cannot be read."""
        return len(self.problems) / max(1, len(self.problems) + len(self.rows))

    def require(self, columns: Collection[str]) -> None:
        """Move the rows in which one of these columns is Unreadable to the problems."""
        dropped = set()
        for index, location in self.unclear.items():
            bad = [name for name in columns if isinstance(self.rows[index].get(name), Unreadable)]
            if bad:
                dropped.add(index)
                self.problems.append(f"{location}: {bad[0]!r} holds {self.rows[index][bad[0]]}")
        self.unclear = {}
        self.rows = [row for index, row in enumerate(self.rows) if index not in dropped]
        self.total -= len(dropped)


def read_sample(source: Source, name: str) -> Sample:
    """Return the first rows of a source. Raises UserError if it cannot be read; `name` is its key for messages."""
    sample = Sample()
    characters = 0
    for location, row in raw_rows(source, name):
        if isinstance(row, str):
            sample.problems.append(f"{location}: {row}")
        else:
            if any(isinstance(value, Unreadable) for value in row.values()):
                sample.unclear[len(sample.rows)] = location
            sample.rows.append(row)
            characters += sum(len(value) if isinstance(value, str) else 8 for value in row.values())
        if len(sample.rows) >= MOST_ROWS or characters >= MOST_CHARACTERS:
            sample.complete = False
            break
    sample.total = len(sample.rows) if sample.complete else max(len(sample.rows), _estimated_rows(source, name, sample))
    return sample


def raw_rows(source: Source, name: str) -> Iterator[tuple[str, Columns | str]]:
    """Yield the location of each row, and the unchanged row or the reason why it cannot be read.

    A value of a Parquet or Arrow file may be Unreadable, because the preparation reads only the columns of the views.
    """
    for location, row in _values(source, name):
        if isinstance(row, dict):
            yield location, row
        elif isinstance(row, ValueError | files.CorruptFileError):
            yield location, str(row)
        else:
            yield location, f"a value of type {type(row).__name__}, not a JSON object"


def _values(source: Source, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(source, TextSource | PythonSource):
        yield from _documents(source, name)
    elif isinstance(source, ParquetSource | ArrowSource):
        yield from _batches(source, name)
    elif isinstance(source, HubSource):
        found = open_rows(source, name)
        if isinstance(found, list):
            yield from (row for path in found for row in rows_of_file(path))
            return
        with as_user_error(f"cannot read the data set {source.path}, split {source.hub_split}"):
            for number, row in enumerate(found, start=1):
                yield f"{source.path}:{source.hub_split}:{number}", row
    elif isinstance(source, FileSource):
        suffixes = csv_rows.SUFFIXES if source.type == "csv" else json_lines.SUFFIXES
        for path in files.find_files(source, name, suffixes):
            yield from rows_of_file(path)


def _documents(source: TextSource | PythonSource, name: str) -> Iterator[tuple[str, Any]]:
    columns = TEXT_COLUMNS[source.type]
    reader = open_source(source, columns, name)
    for piece in reader.pieces():
        for record in reader.read(piece):
            location = reader.place(piece, record.position, 0)
            if record.views is None:
                yield location, ValueError(record.problem)
            else:
                yield location, dict(zip(columns, record.views, strict=True))


def _batches(source: ParquetSource | ArrowSource, name: str) -> Iterator[tuple[str, Any]]:
    is_parquet = isinstance(source, ParquetSource)
    for path in files.find_files(source, name, parquet.SUFFIXES if is_parquet else arrow.SUFFIXES):
        all_rows = (row for batch in (_parquet if is_parquet else _arrow)(path) for row in cells(batch))
        yield from ((f"{path}:{number}", row) for number, row in enumerate(all_rows, start=1))


def _parquet(path: str) -> Iterator[pa.RecordBatch]:
    with parquet.opened(path) as file:
        yield from file.iter_batches(parquet.BATCH_ROWS, use_threads=False)


def _arrow(path: str) -> Iterator[pa.RecordBatch]:
    with arrow.opened(path) as (_, batches):
        yield from batches


def _estimated_rows(source: Source, name: str, sample: Sample) -> int:
    """Return the number of rows of files from their size; 0 if it does not follow, as for compressed files."""
    if isinstance(source, ParquetSource):
        count = 0
        for path in files.find_files(source, name, parquet.SUFFIXES):
            with parquet.opened(path) as file:
                count += file.metadata.num_rows
        return count
    if not isinstance(source, FileSource) or source.path is None:
        return 0
    suffixes = (*csv_rows.SUFFIXES, *json_lines.SUFFIXES, *arrow.SUFFIXES, "") if Path(source.path).is_dir() else ("",)
    try:
        size = sum(files.size_of(path) for path in files.find_files(source, name, suffixes))
    except UserError:
        return 0
    texts = [json.dumps(row, ensure_ascii=False, default=str) for row in islice(sample.rows, ROWS_FOR_SIZE)]
    return size * len(texts) // max(1, sum(len(text.encode(errors="replace")) + 1 for text in texts))
