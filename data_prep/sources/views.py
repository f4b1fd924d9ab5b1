"""From the columns of a row to the views of a record: named columns, roles of `messages`, templates, lists of texts."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from data_prep.config import BaseSource
from data_prep.console import UserError
from data_prep.sources.chat import COLUMNS, is_conversation, role_reader
from data_prep.sources.record import Record
from data_prep.sources.text_values import NotTextError, to_text

Row = dict[str, Any]
Getter = Callable[[Row], str | None]
"""The text of a view, None where the row lacks it. Raises NoText."""

TEMPLATE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[^{}]+")


@dataclass(frozen=True)
class ViewMapping:
    """How the rows of one source become records."""

    provided_views: tuple[bool, ...]
    columns: tuple[str, ...]
    """The columns that it reads."""
    records: Callable[[Row, int], Iterable[Record]]
    """The records of the row at a position, nearly always one; the one malformed record of a row of which a view is no text."""


def make_mapping(source: BaseSource, views: tuple[str, ...], name: str, default: dict[str, str]) -> ViewMapping:
    """The mapping that a source gives, or `default`. Raises UserError, with the dotted `name` of the source, for what cannot be meant."""
    if isinstance(source.views, str):
        return ViewMapping((True,) * len(views), (source.views,), _records_of_list(source.views, len(views)))
    chosen = default if source.views is None else source.views
    if not set(chosen) <= set(views):
        raise UserError(f"{name}.views names {sorted(chosen)}, but data.views are {list(views)}")
    getters: list[Getter] = []
    columns: dict[str, None] = {}
    for view in views:
        getter, reads = _getter(chosen[view], f"{name}.views.{view}") if view in chosen else (_absent, [])
        getters.append(getter)
        columns |= dict.fromkeys(reads)
    return ViewMapping(tuple(view in chosen for view in views), tuple(columns), _record_of(getters))


def first_and_last(views: tuple[str, ...], first: str, last: str) -> dict[str, str]:
    """The default of a source of pairs: its context is the first view, its target the last."""
    return {views[0]: first} | {views[-1]: last}


def chat_columns(views: tuple[str, ...], column: str) -> dict[str, str]:
    """Return the default for rows with a conversation in a column."""
    return {view: view for view in views} | first_and_last(views, f"{column}.user", f"{column}.assistant")


class RowMapping:
    """The mapping that each row of a source takes: that of its conversation if it has one, otherwise that of the columns."""

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
    """Return the mapping of a source whose rows all have these columns. Raises UserError for one that reads another."""
    by_name = {view: view for view in views}
    chat = next((column for column in COLUMNS if column in columns and column not in views), None)
    if chat is None or len(views) == 1 or source.views is not None:
        mapping = make_mapping(source, views, name, by_name)
        check_columns(mapping, columns, where, name)
        return mapping
    mapping = make_mapping(source, views, name, chat_columns(views, chat))
    check_columns(mapping, columns, where, name)
    if not set(views) <= set(columns):
        return mapping
    plain = make_mapping(source, views, name, by_name)  # of the rows without a conversation
    return ViewMapping(
        plain.provided_views,
        tuple(dict.fromkeys(mapping.columns + plain.columns)),
        lambda row, position: (mapping if is_conversation(row.get(chat)) else plain).records(row, position),
    )


def check_columns(mapping: ViewMapping, known: Iterable[str], where: str, name: str) -> None:
    """Raises UserError for a mapping that reads a column which `where` does not have."""
    known = list(known)
    for column in mapping.columns:
        if column not in known:
            shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
            raise UserError(
                f"{where} has no column {column!r}, only {shown or 'none'}; name its columns in {name}.views"
            )


def template_columns(given: str) -> list[str]:
    """Return the columns of a template; none for a view that is a single column."""
    return [part[1] for part in TEMPLATE.finditer(given) if part[1]]


def _getter(given: str, key: str) -> tuple[Getter, list[str]]:
    """What reads one view, and the columns that it reads."""
    if "{" not in given and "}" not in given:
        return _column(given)
    parts = list(TEMPLATE.finditer(given))
    if "".join(part[0] for part in parts) != given:
        raise UserError(f"{key}: cannot read the template {given!r}: write {{column}}, and a doubled brace for a brace")
    named = [part[1] for part in parts if part[1]]
    if not named:
        raise UserError(f"{key}: the template {given!r} names no column, so all records would be the same")
    read = [_column(column) for column in named]
    getters = iter(read)
    pieces = [next(getters)[0] if part[1] else part[0][:1] if part[0] in ("{{", "}}") else part[0] for part in parts]
    return _template(pieces), [column for _, columns in read for column in columns]


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
                return None  # what is put together around nothing is nothing
            texts.append(text)
        return "".join(texts)

    return get


def _absent(row: Row) -> None:
    return None


def _record_of(getters: list[Getter]) -> Callable[[Row, int], tuple[Record]]:
    new = tuple.__new__  # a third of the time of `Record(...)`

    def records(row: Row, position: int) -> tuple[Record]:
        views = []
        try:
            for getter in getters:
                text = getter(row)
                views.append("" if not text or text.isspace() else text)  # a blank view is an absent one
        except NotTextError as problem:
            return (Record(None, position, str(problem)),)
        return (new(Record, (tuple(views), position, "", "malformed", "")),)

    return records


def _records_of_list(column: str, views: int) -> Callable[[Row, int], list[Record]]:
    def records(row: Row, position: int) -> list[Record]:
        found = row.get(column)
        try:
            if not isinstance(found, list | None):
                raise NotTextError(f"{column!r} holds a value of type {type(found).__name__}, not a list of texts")
            texts = [text for entry in found or () if (text := to_text(entry, column)) and text.strip()]
        except NotTextError as problem:
            return [Record(None, position, str(problem))]
        group = texts[views - 1] if len(texts) > views else ""  # a list that becomes one record is drawn as any other
        texts += [""] * (-len(texts) % views or views * (not texts))
        return [
            Record(tuple(texts[start : start + views]), position, group=group) for start in range(0, len(texts), views)
        ]

    return records
