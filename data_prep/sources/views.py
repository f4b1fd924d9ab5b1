"""Mapping of a row's columns to the views of a record: named columns, message roles, templates, lists of texts."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from data_prep.config import BaseSource
from data_prep.sources.chat import COLUMNS, is_conversation, role_reader
from data_prep.sources.record import Record
from data_prep.sources.text_values import NotTextError, to_text
from data_prep.utils.console import UserError

Row = dict[str, Any]
Getter = Callable[[Row], str | None]
"""Function that returns the text of a view, or None if the row lacks it. It raises NotTextError."""

TEMPLATE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[^{}]+")


@dataclass(frozen=True)
class ViewMapping:
    """Mapping of the rows of one source to records."""

    provided_views: tuple[bool, ...]
    columns: tuple[str, ...]
    """Columns that the mapping reads."""
    records: Callable[[Row, int], Iterable[Record]]
    """Function that returns the records of a row at a position, nearly always one. If a view is not text, it
    returns one malformed record."""


def make_mapping(source: BaseSource, views: tuple[str, ...], name: str, default: dict[str, str]) -> ViewMapping:
    """Return the mapping of a source, or `default` if there is none. Raises UserError if the mapping is not valid.

    `name` is the dotted key of the source.
    """
    if isinstance(source.views, str):
        return ViewMapping((True,) * len(views), (source.views,), _records_of_list(source.views, len(views)))
    chosen = default if source.views is None else source.views
    if not set(chosen) <= set(views):
        raise UserError(f"{name}.views names {sorted(chosen)}, but data.views are {list(views)}: use only these")
    getters: list[Getter] = []
    columns: dict[str, None] = {}
    for view in views:
        getter, reads = _getter(chosen[view], f"{name}.views.{view}") if view in chosen else (_absent, [])
        getters.append(getter)
        columns |= dict.fromkeys(reads)
    return ViewMapping(tuple(view in chosen for view in views), tuple(columns), _record_of(getters))


def first_and_last(views: tuple[str, ...], first: str, last: str) -> dict[str, str]:
    """Return the default mapping of a source of pairs: the context is the first view, the target the last."""
    return {views[0]: first} | {views[-1]: last}


def chat_columns(views: tuple[str, ...], column: str) -> dict[str, str]:
    """Return the default mapping of rows with a conversation in a column."""
    return {view: view for view in views} | first_and_last(views, f"{column}.user", f"{column}.assistant")


class RowMapping:
    """Mapping that is chosen for each row: the conversation's if the row has one, otherwise the columns'."""

    def __init__(self, source: BaseSource, views: tuple[str, ...], name: str):
        self._views = views
        self.columns = make_mapping(source, views, name, {view: view for view in views})
        self._chats = {
            column: make_mapping(source, views, name, chat_columns(views, column))
            for column in COLUMNS
            if len(views) > 1 and column not in views
        }

    def of(self, row: Row) -> ViewMapping:
        """Return the mapping of a row."""
        for column, mapping in self._chats.items():
            if is_conversation(row.get(column)):
                return mapping
        if all(view in row for view in self._views):
            return self.columns
        malformed = (mapping for column, mapping in self._chats.items() if row.get(column) is not None)
        return next(malformed, self.columns)


def column_mapping(
    source: BaseSource, views: tuple[str, ...], columns: list[str], where: str, name: str
) -> ViewMapping:
    """Return the mapping of a source whose rows all have these columns.

    Raises UserError if the mapping reads any other column.
    """
    columns_by_view = {view: view for view in views}
    chat = next((column for column in COLUMNS if column in columns and column not in views), None)
    if chat is None or len(views) == 1 or source.views is not None:
        mapping = make_mapping(source, views, name, columns_by_view)
        check_columns(mapping, columns, where, name)
        return mapping
    mapping = make_mapping(source, views, name, chat_columns(views, chat))
    check_columns(mapping, columns, where, name)
    if not set(views) <= set(columns):
        return mapping
    plain = make_mapping(source, views, name, columns_by_view)  # mapping of rows without a conversation
    return ViewMapping(
        plain.provided_views,
        tuple(dict.fromkeys(mapping.columns + plain.columns)),
        lambda row, position: (mapping if is_conversation(row.get(chat)) else plain).records(row, position),
    )


def check_columns(mapping: ViewMapping, available: Iterable[str], where: str, name: str) -> None:
    """Raise UserError if a mapping reads a column that `where` does not have."""
    names = list(available)
    for column in mapping.columns:
        if column not in names:
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise UserError(
                f"{where} has no column {column!r}, only {shown or '(none)'}: "
                f"set the columns of the views in {name}.views"
            )


def template_columns(template: str) -> list[str]:
    """Return the columns of a template; none for a view that is a single column."""
    return [part[1] for part in TEMPLATE.finditer(template) if part[1]]


def _getter(template: str, key: str) -> tuple[Getter, list[str]]:
    """Return the getter of a view and the columns that it reads."""
    if "{" not in template and "}" not in template:
        return _column(template)
    parts = list(TEMPLATE.finditer(template))
    if "".join(part[0] for part in parts) != template:
        raise UserError(f"{key}: cannot parse the template {template!r}: write {{column}}, and double a literal brace")
    columns = [part[1] for part in parts if part[1]]
    if not columns:
        raise UserError(
            f"{key}: the template {template!r} names no column, so all records would be equal: add {{column}}"
        )
    columns_read = [_column(column) for column in columns]
    getters = iter(columns_read)
    # A doubled brace stands for a single one.
    pieces = [next(getters)[0] if part[1] else part[0][:1] if part[0] in ("{{", "}}") else part[0] for part in parts]
    return _template(pieces), [column for _, columns in columns_read for column in columns]


def _column(column: str) -> tuple[Getter, list[str]]:
    conversation, dot, role = column.partition(".")
    if dot and conversation in COLUMNS:
        return role_reader(conversation, role), [conversation]

    def get(row: Row) -> str | None:
        text = row.get(column)
        return text if text.__class__ is str and text.isascii() else to_text(text, column)

    return get, [column]


def _template(parts: list[str | Getter]) -> Getter:
    def get(row: Row) -> str | None:
        texts = []
        for part in parts:
            text = part if isinstance(part, str) else part(row)
            if text is None or (text is not part and not text.strip()):
                return None  # a template without one of its values is an absent view
            texts.append(text)
        return "".join(texts)

    return get


def _absent(row: Row) -> None:
    return None


def _record_of(getters: list[Getter]) -> Callable[[Row, int], tuple[Record]]:
    new = tuple.__new__  # three times as fast as `Record(...)`

    def records(row: Row, position: int) -> tuple[Record]:
        views = []
        try:
            for getter in getters:
                text = getter(row)
                views.append("" if not text or text.isspace() else text)  # a blank view counts as absent
        except NotTextError as problem:
            return (Record(None, position, str(problem)),)
        return (new(Record, (tuple(views), position, "", "malformed", "")),)

    return records


def _records_of_list(column: str, views: int) -> Callable[[Row, int], list[Record]]:
    def records(row: Row, position: int) -> list[Record]:
        entries = row.get(column)
        try:
            if not isinstance(entries, list | None):
                raise NotTextError(f"{column!r} holds a value of type {type(entries).__name__}, not a list of texts")
            texts = [text for entry in entries or () if (text := to_text(entry, column)) and text.strip()]
        except NotTextError as problem:
            return [Record(None, position, str(problem))]
        group = texts[views - 1] if len(texts) > views else ""  # a list with a single record needs no group
        texts += [""] * (-len(texts) % views or views * (not texts))
        return [
            Record(tuple(texts[start : start + views]), position, group=group) for start in range(0, len(texts), views)
        ]

    return records
