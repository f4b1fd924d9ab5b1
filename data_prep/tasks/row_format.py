"""The row format of a public data set."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

Columns = dict[str, Any]


class RowFormat(NamedTuple):
    """The columns of a public data set, and the function that turns a row into a context and a target."""

    columns: frozenset[str]
    """Columns that every row in this format has."""
    views: Callable[[Columns], tuple[str, str]]
    """A function that returns the context and the target of a row.

    It raises KeyError, IndexError, TypeError or ValueError for a row that is not in this format.
    """
    question: str
    """Column that holds the question without the prompt.

    Contamination checks compare this text too, because training data may put the question into a different prompt.
    """
    prompt: re.Pattern[str] | None = None
    """Pattern of a context that `views` makes or the public LLM-JEPA data contain; each column is a named group."""


def label_number(label: Any, label_count: int) -> int:
    """Return a label as an integer in [0, label_count).

    Raises ValueError for anything else, such as -1 in unlabelled splits.
    """
    if not re.fullmatch(r"\d+", str(label)) or int(label) >= label_count:
        raise ValueError(f"the label {label!r} is not a number from 0 to {label_count - 1}")
    return int(label)


def to_text(value: Any) -> str:
    """Return a value that must be non-empty text. Raises ValueError for anything else."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected non-empty text, found {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("a column contains a lone surrogate, which is not valid text") from None
    return value
