"""The rows of an evaluation task, from local files or a data set on the hub.

The preparation and the evaluation both read the rows with this module.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.config import HubSource, JsonSource
from data_prep.sources import csv_rows, files, json_array, parquet
from data_prep.sources.hub import as_user_error, open_rows
from data_prep.sources.json_lines import SUFFIXES, parse
from data_prep.sources.record import Piece, Record
from data_prep.sources.views import RowMapping
from data_prep.tasks.row_format import RowFormat
from data_prep.utils.console import UserError
from data_prep.utils.files import write_text

logger = logging.getLogger(__name__)

Columns = dict[str, Any]


class Row(NamedTuple):
    """One row of a task."""

    views: tuple[str, ...]
    """Text of each of `data.views`."""
    columns: Columns
    """The unchanged row of the file."""

    @property
    def context(self) -> str:
        """Return the first view."""
        return self.views[0]

    @property
    def target(self) -> str:
        """Return the last view."""
        return self.views[-1]


class RowReader:
    """A reader of the rows of one source.

    A row is read with the `views` of the source, if it has any. If there are none, or if the row does not fit a mapping
    of views, these formats are tried: the task's public data set, columns with the names of the views, a conversation.
    With `allow_missing_views`, a row may lack some of the views; these are then empty.
    """

    def __init__(
        self,
        source: JsonSource | HubSource,
        views: tuple[str, ...],
        key: str,
        row_format: RowFormat | None = None,
        *,
        allow_missing_views: bool = False,
    ):
        self.source, self.views, self.key = source, views, key
        self.row_format, self.allow_missing_views = row_format, allow_missing_views
        self._mapping = RowMapping(source, views, key)
        self._by_name = RowMapping(JsonSource(type="json"), views, key)
        self.remainders = 0
        """Number of lists that end with too few texts for a complete record."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order. Raises UserError with the location for a row that lacks a view."""
        for location, columns in _objects(self.source, self.key):
            yield from self._rows_of(columns, location)

    def _rows_of(self, columns: Columns, location: str) -> Iterator[Row]:
        """Yield the rows of one object: several if a column has a list of texts, else one."""
        has_public_columns = self.row_format is not None and self.row_format.columns <= columns.keys()
        if has_public_columns and self.source.views is None and self._mapping.of(columns) is self._mapping.columns:
            yield self._public_row(columns, location)
            return
        records = list(self._mapping.of(columns).records(columns, 0))
        if isinstance(self.source.views, str):
            complete = [record for record in records if record.views is None or all(record.views)]
            self.remainders += len(complete) < len(records)
            records = complete
        elif not self._fits(records[0]):
            if has_public_columns:
                yield self._public_row(columns, location)
                return
            by_name = [record for record in self._by_name.of(columns).records(columns, 0) if self._fits(record)]
            records = by_name or records
        for record in records:
            if not self._fits(record):
                raise UserError(self._problem(record, columns, location))
            yield Row(record.texts, columns)

    def _fits(self, record: Record) -> bool:
        """Return whether a record has the required views."""
        if record.views is None:
            return False
        return any(record.views) if self.allow_missing_views else all(record.views)

    def _public_row(self, columns: Columns, location: str) -> Row:
        """Read a row in the format of the public data set. Raises UserError if a column has an unexpected value."""
        assert self.row_format is not None
        try:
            return Row(self.row_format.views(columns), columns)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{location}: {error}; the row was read in the format of the public data set, with the columns "
                f"{', '.join(sorted(self.row_format.columns))}; for other columns or values set {self.key}.views"
            ) from None

    def _problem(self, record: Record, columns: Columns, location: str) -> str:
        """Return the message for a record without the required views."""
        missing = [
            self._described(view) for view, text in zip(self.views, record.views or (), strict=False) if not text
        ]
        problem = record.problem or f"no text for the view{'s' * (len(missing) > 1)} {' and '.join(missing)}"
        found = f"{problem}; the row has {', '.join(columns) or 'no column'}"
        if self.source.views is None and self.key.startswith("evaluation."):
            example = ", ".join(f"{view}: COLUMN" for view in self.views)
            return (
                f"{location}: {found}: if a source of data.sources has these columns, add views: {{{example}}} to it; "
                f"otherwise name the columns of the views in {self.key}, as for a source of data.sources"
            )
        return f"{location}: {found}: name the columns of the views in {self.key}, as for a source of data.sources"

    def _described(self, view: str) -> str:
        """Return the name of a view, followed by its column if the column has a different name."""
        mapped = self.source.views.get(view, view) if isinstance(self.source.views, dict) else view
        return view if mapped == view else f"{view} ({mapped})"


def read_rows(
    source: JsonSource | HubSource,
    views: tuple[str, ...],
    key: str,
    rows: int | None = None,
    row_format: RowFormat | None = None,
    *,
    allow_missing_views: bool = False,
) -> list[Row]:
    """Return the first `rows` rows of a source; see `RowReader`. Raises UserError if there are none."""
    reader = RowReader(source, views, key, row_format, allow_missing_views=allow_missing_views)
    result = list(islice(reader.rows(), rows))
    if not result:
        raise UserError(f"{source.path} ({key}) has no rows")
    if reader.remainders:
        logger.info(
            f"note: {source.path} ({key}): {reader.remainders:,} lists end with too few texts for a complete row; "
            "those texts are skipped"
        )
    return result


def _objects(source: JsonSource | HubSource, key: str) -> Iterator[tuple[str, Columns]]:
    """Yield the unchanged rows of a source, each with its location."""
    paths = open_rows(source, key) if isinstance(source, HubSource) else files.find_files(source, key, SUFFIXES)
    if isinstance(source, HubSource) and not isinstance(paths, list):
        with as_user_error(f"cannot read the data set {source.path} ({key}), split {source.hub_split}"):
            for number, columns in enumerate(paths, start=1):
                yield f"hub:{source.path}:{source.hub_split}:{number}", columns
        return
    for path in paths:
        for location, value in rows_of_file(path):
            if isinstance(value, files.CorruptFileError):
                raise UserError(f"{path}: {value}")
            yield location, _columns(value, location)


def rows_of_file(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the unchanged rows of a JSON, CSV or Parquet file, each with its location.

    A row that cannot be read is a ValueError. If the rest of the file cannot be read, the last row is a
    CorruptFileError. Raises UserError if the file cannot be read at all.
    """
    size = files.size_of(path)
    piece = Piece(path, 0, size, size)
    if path.endswith(csv_rows.SUFFIXES):
        yield from ((f"{path}:{line}", row) for line, row in csv_rows.read_objects(piece))
        return
    if path.endswith(parquet.SUFFIXES):
        yield from ((f"{path}:{number}", row) for number, row in parquet.read_objects(path))
        return
    try:
        with files.open_piece(piece) as file:
            yield from _objects_of(path, files.block_reader(file, path))
    except files.CorruptFileError as problem:
        yield path, problem


def _objects_of(path: str, read: Callable[[], bytes]) -> Iterator[tuple[str, Any]]:
    if json_array.is_array(path):
        yield from ((f"{path}, element {number}", value) for number, value in enumerate(json_array.elements(read), 1))
        return
    for number, line in enumerate(files.lines(read), start=1):
        if line is None or (line and not line.isspace()):
            yield f"{path}:{number}", _value(line)


def _value(line: bytes | None) -> Any:
    """Return the JSON value of a line, or a ValueError that describes the problem."""
    try:
        return parse(line) if line is not None else ValueError("a line of more than 16 MiB")
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON ({error})")


def _columns(value: Any, location: str) -> Columns:
    """Return a JSON value as a row. Raises UserError if it is an error or not an object."""
    if isinstance(value, ValueError):
        raise UserError(f"{location}: {value}")
    if not isinstance(value, dict):
        raise UserError(f"{location}: a value of type {type(value).__name__}, not a JSON object")
    return value


def write_views(path: Path, views: tuple[str, ...], texts: Iterable[tuple[str, ...]]) -> JsonSource:
    """Write records as a file of JSON lines with a column for each view, and return the file as a source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = ({view: text for view, text in zip(views, record, strict=True) if text} for record in texts)
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return JsonSource(type="json", path=str(path))
