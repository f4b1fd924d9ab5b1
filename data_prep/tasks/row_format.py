"""The form in which a public data set has its rows."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

Columns = dict[str, Any]


class RowFormat(NamedTuple):
    """The columns of a public data set, and how they become the context and the target."""

    columns: frozenset[str]
    """Columns that a row of this form has."""
    views: Callable[[Columns], tuple[str, str]]
    """Context and target of a row. Raises KeyError, IndexError, TypeError or ValueError for a row that is not of this form."""
    question: str
    """The column that holds the question alone. It is kept out of training too, because the training data may have another prompt."""
    prompt: re.Pattern[str] | None = None
    """The context as `views` and the public LLM-JEPA data write it, with a named group for each column in it."""


def label_number(label: Any, labels: int) -> int:
    """Return a label as a number from 0. Raises ValueError for anything else, such as -1 in splits without labels."""
    if not re.fullmatch(r"\d+", str(label)) or int(label) >= labels:
        raise ValueError(f"the label {label!r}, where labels are 0 to {labels - 1}")
    return int(label)


def to_text(value: Any) -> str:
    """Return a column that must be text. Raises ValueError for anything else."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is empty, or not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair, which is no text") from None
    return value
