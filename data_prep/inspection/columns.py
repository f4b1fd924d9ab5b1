"""The columns of rows: their types, contents and lengths."""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from data_prep.inspection.languages import language_of
from data_prep.sources.arrow_values import Unreadable
from data_prep.sources.chat import COLUMNS, ROLES, is_conversation, role_reader
from data_prep.sources.text_values import NotTextError, to_text
from data_prep.task_rows import Columns

MOST_LABELS = 50
"""Maximum number of different values of a column of labels, as in the classification tasks."""
ROWS_PER_LABEL = 5
"""Smallest mean number of rows with the same label."""
LONGEST_LABEL = 60
"""Maximum length of a label, in characters."""
EXAMINED = 2000
"""Number of texts from which the content of a column is recognised."""
MOST = 0.9
"""Fraction of the texts of a column that must have a form."""
IDENTIFIER = re.compile(r"(?i)(.*[_-])?(id|ids|idx|index|uuid|guid|uid|url|urls|link|hash|sha\d*|qid|timestamp|date)")
"""Names of columns that identify a row or its origin."""
SQL = re.compile(r"(?is)\s*\(*\s*(select|with|insert|update|delete|create)\b")
REGEX_OPERATOR = re.compile(r"\.\*|\[\^?[^\]\s]+\]|\\[bdwsBDWS]|\)[*+?]|\{\d+,?\d*\}|\)[|&]\(|~\(")
CODE = re.compile(r"(?m)^\s*(def|class|import|from|public|static|function|func|return|if|for|while)\b.*[:({;]|[;{]\s*$")
WORD, FEWEST_WORDS = re.compile(r"(?<!\S)[a-z]{2,}(?!\S)"), 3
"""A word between blanks; a text with several of them is not a regex."""
MOST_OF_REGEXES = 0.75
"""Fraction of the texts of a column of regexes that must have an operator; a regex may also be a plain string."""
LONG_TEXT = 20
"""Median length of texts that are longer than the name of a column, in characters."""
FEWEST_WORDS_OF_VALUE = 4
"""Number of words from which the name of a column of long texts looks like one of them."""
Content = Literal["labels", "numbers", "SQL", "regex", "code", "text"]
Kind = Literal["text", "texts", "other"]


@dataclass
class Column:
    """One column, or the turns of one role of a conversation (`messages.user`)."""

    name: str
    kind: Kind
    """Type of the values: text (numbers included), lists of texts, or values that cannot be a view."""
    rows: int
    """Number of examined rows."""
    filled: int = 0
    """Number of rows with a value that is not blank."""
    distinct: int = 0
    """Number of different values."""
    content: Content = "text"
    language: str = ""
    """Language of a text; empty if it is not recognised."""
    median: int = 0
    """Median length over the filled rows, in characters; for lists, in texts."""
    longest: int = 0
    """Length of the longest value, in characters; for lists, in texts."""
    examples: list[str] = field(default_factory=list)
    """Different values, at most MOST_LABELS, the most common first if they are labels."""
    unreadable: str = ""
    """Description of a value that cannot be read, if there is one."""
    is_role: bool = False
    """Whether the texts are the turns of one role."""
    several_turns: int = 0
    """Number of conversations with several turns of the role, which cannot be a view."""

    @property
    def is_identifier(self) -> bool:
        """Whether the column identifies a row or its origin and describes nothing."""
        return IDENTIFIER.fullmatch(self.name) is not None

    @property
    def described(self) -> str:
        """Content of the column in a few words."""
        if self.kind == "texts":
            return f"lists of texts{f', {self.language}' if self.language else ''}"
        if self.kind == "other":
            return self.unreadable or "no text"
        if self.content == "labels":
            return f"{self.distinct} label{'s' * (self.distinct > 1)}"
        return self.language or "text" if self.content == "text" else self.content


def describe_columns(rows: Sequence[Columns]) -> list[Column]:
    """Return the columns of rows, in the order in which they first occur."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = []
    for name in names:
        values = [row.get(name) for row in rows]
        if name in COLUMNS and any(map(is_conversation, values)):
            columns += [_role_column(name, role, rows) for role in _roles(values)]
        else:
            columns.append(_column(name, values))
    return columns


def _roles(conversations: Iterable[Any]) -> list[str]:
    """Return the roles of conversations by the names of the project: `user` for ShareGPT's `human`."""
    found: Counter[str] = Counter()
    for turns in conversations:
        for turn in turns if is_conversation(turns) else ():
            role = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
            if isinstance(role, str):
                found[ROLES.get(role, role)] += 1
    known = [role for role in ("system", "user", "assistant") if role in found]
    return known + sorted(found.keys() - set(known))


def _role_column(conversation: str, role: str, rows: Sequence[Columns]) -> Column:
    name = f"{conversation}.{role}"
    read = role_reader(conversation, role)
    texts, several = [], 0
    for row in rows:
        try:
            texts.append(read(row))
        except NotTextError as problem:
            texts.append(None)
            several += "turns" in str(problem)
    column = _column(name, texts)
    column.is_role, column.several_turns = True, several
    return column


def header_questions(columns: Sequence[Column]) -> list[str]:
    """Return a question if the names of the columns look like values, because a CSV file may have no header line."""
    found = {_resembles_value(column) for column in columns if column.kind == "text" and not column.is_role}
    if True not in found or False in found:
        return []
    names = ", ".join(column.name if len(column.name) <= 40 else f"{column.name[:40]}..." for column in columns)
    return [
        f"the names of the columns look like values ({names}); if the file has no header line, add a first line with "
        "names, such as question and answer"
    ]


def _resembles_value(column: Column) -> bool | None:
    """Return whether the name of a column looks like its values; None if that cannot be decided."""
    if column.content == "labels":
        return column.name in column.examples
    if column.content in FORMS:
        has_form = FORMS[column.content](column.name)
        return has_form or (None if column.content == "regex" else False)
    if column.median < LONG_TEXT:
        return None
    return len(column.name.split()) >= FEWEST_WORDS_OF_VALUE and len(column.name) >= column.median / 4


def _column(name: str, values: Sequence[Any]) -> Column:
    present = [value for value in values if value is not None and value != "" and value != []]
    lists = [value for value in present if isinstance(value, list)]
    if lists and len(lists) == len(present):
        texts = [entry for value in lists for entry in value if isinstance(entry, str)]
        is_texts = len(texts) == sum(map(len, lists))
        column = Column(name, "texts" if is_texts else "other", len(values), len(present))
        column.language = language_of(texts[:EXAMINED])
        if is_texts:
            column.median, column.longest = round(statistics.median(map(len, lists))), max(map(len, lists))
        return column
    texts = list(_texts(present, name))
    unreadable = next((str(value) for value in present if isinstance(value, Unreadable)), "")
    if len(texts) < MOST * len(present):
        return Column(name, "other", len(values), len(present), unreadable=unreadable)
    texts = [text for text in texts if text.strip()]
    column = Column(name, "text", len(values), len(texts), unreadable=unreadable)
    if not texts:
        return column
    counts = Counter(texts)
    column.distinct = len(counts)
    column.median = round(statistics.median(map(len, texts)))
    column.longest = max(map(len, texts))
    column.content = _content(texts, counts)
    column.examples = [text for text, _ in counts.most_common(MOST_LABELS)]
    if column.content == "text":
        column.language = language_of(_spread(texts))
    return column


def _texts(values: Iterable[Any], name: str) -> Iterator[str]:
    for value in values:
        if isinstance(value, Unreadable):
            continue
        try:
            text = to_text(value, name)
        except NotTextError:
            continue
        if text is not None:
            yield text


def _content(texts: Sequence[str], counts: Counter[str]) -> Content:
    is_short = max(map(len, counts)) <= LONGEST_LABEL
    if len(counts) <= MOST_LABELS and len(texts) >= ROWS_PER_LABEL * len(counts) and is_short:
        return "labels"
    examined = _spread(texts)
    for content, has_form in FORMS.items():
        if sum(map(has_form, examined)) >= (MOST_OF_REGEXES if content == "regex" else MOST) * len(examined):
            return content
    return "text"


def _spread(texts: Sequence[str]) -> list[str]:
    """Return at most EXAMINED texts, spread evenly, because files are often sorted."""
    return list(texts[:: max(1, len(texts) // EXAMINED)][:EXAMINED])


def _is_number(text: str) -> bool:
    try:
        float(text.strip().replace(",", "").rstrip("%").lstrip("$€£"))
    except ValueError:
        return False
    return True


FORMS: dict[Content, Callable[[str], bool]] = {
    "numbers": _is_number,
    "SQL": lambda text: SQL.match(text) is not None,
    "code": lambda text: CODE.search(text) is not None,
    "regex": lambda text: REGEX_OPERATOR.search(text) is not None and len(WORD.findall(text)) < FEWEST_WORDS,
}
"""Functions that recognise the form of a text, in the order in which they are tried."""
