"""The rows of a task, from JSON lines or a data set of the hub."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.config import HubSource, JsonSource
from data_prep.console import UserError
from data_prep.files import write_text
from data_prep.sources import files
from data_prep.sources.hub import stream, told
from data_prep.sources.json_lines import SUFFIXES, parse
from data_prep.sources.record import Piece
from data_prep.sources.views import chat_columns, make_mapping

Columns = dict[str, Any]
OwnColumns = Callable[[Columns], tuple[str, ...] | None]
"""The views of a row that stands as a public data set has it; None where the row is of another form."""


class Row(NamedTuple):
    """One row of a task."""

    views: tuple[str, ...]
    """As `data.views` of the run."""
    columns: Columns
    """The row as it stands in its file."""

    @property
    def context(self) -> str:
        """The first view."""
        return self.views[0]

    @property
    def target(self) -> str:
        """The last view."""
        return self.views[-1]


def read_rows(source: JsonSource | HubSource, views: tuple[str, ...], key: str, rows: int | None = None, own: OwnColumns | None = None) -> list[Row]:
    """The first `rows` of a source. Its columns are those of the views, of `messages`, or else those that `own` knows.

    Raises UserError, with the place, for a row that lacks a view.
    """
    plain = make_mapping(source, views, key, {view: view for view in views})
    chat = make_mapping(source, views, key, chat_columns(views)) if len(views) > 1 else plain
    found: list[Row] = []
    for place, columns in _objects(source, key):
        if len(found) == rows:
            break
        mapping = chat if columns.get("messages") is not None else plain
        records = list(mapping.records(columns, 0))
        if not all(record.views and all(record.views) for record in records) and own is not None and (texts := _own_views(own, columns, place)):
            found.append(Row(texts, columns))
            continue
        for record in records:
            if record.views is None or not all(record.views):
                raise UserError(f"{place}: {record.problem or ' or '.join(mapping.columns) + ' is missing or empty'}; "
                                f"the row has {', '.join(columns) or 'no column'}: name those of the views in {key}, as a source of data_prep")
            found.append(Row(record.views, columns))
    if not found:
        raise UserError(f"{source.path} ({key}) holds no rows")
    return found[:rows]


def _own_views(own: OwnColumns, columns: Columns, place: str) -> tuple[str, ...] | None:
    try:
        texts = own(columns)
        if texts is not None and not all(isinstance(text, str) and text for text in texts):
            raise ValueError("a text that is empty, or none")
        return texts
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{place}: not the columns of this data set: {type(error).__name__}: {error}") from None


def _objects(source: JsonSource | HubSource, key: str) -> Iterator[tuple[str, Columns]]:
    """The rows of a source as they stand there, each with its place."""
    if isinstance(source, HubSource):
        with told(f"cannot read the data set {source.path} ({key}), split {source.hub_split}"):
            for number, columns in enumerate(stream(source), start=1):
                yield f"hub:{source.path}:{source.hub_split}:{number}", columns
        return
    for path in files.find_files(source, key, SUFFIXES):
        size = files.size_of(path)
        try:
            with files.opened(Piece(path, 0, size, size)) as file:
                for number, line in enumerate(files.lines(files.reads_of(file, path)), start=1):
                    if line is None or (line and not line.isspace()):
                        yield f"{path}:{number}", _object(line, f"{path}:{number}")
        except files.Damaged as problem:
            raise UserError(f"{path}: {problem}") from None


def _object(line: bytes | None, place: str) -> Columns:
    try:
        columns = parse(line) if line is not None else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error})") from None
    if not isinstance(columns, dict):
        raise UserError(f"{place}: not an object of JSON, or a line of more than 16 MiB")
    return columns


def write_views(path: Path, views: tuple[str, ...], texts: Iterable[tuple[str, ...]]) -> JsonSource:
    """Records as a file of JSON lines with a column a view."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(dict(zip(views, record, strict=True)), ensure_ascii=False) + "\n" for record in texts))
    return JsonSource(type="json", path=str(path))
