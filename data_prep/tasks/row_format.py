"""The row format of a public data set."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

Columns = dict[str, Any]


class RowFormat(NamedTuple):
    """The columns of a public data set, and their conversion to the context and the target."""

    columns: frozenset[str]
    """Columns that every row in this format has."""
    views: Callable[[Columns], tuple[str, str]]
    """A function that returns the context and the target of a row.

    It raises KeyError, IndexError, TypeError or ValueError for a row that is not in this format.
    """
    question: str
    """Column with only the question.

    It is also kept out of training, because the training data may have another prompt.
    """
    prompt: re.Pattern[str] | None = None
    """Pattern of the context in `views` and in the public LLM-JEPA data, with a named group for each of its columns."""


def label_number(label: Any, labels: int) -> int:
    """Return a label as an integer in [0, labels). Raises ValueError otherwise, such as for -1 in unlabelled splits."""
    if not re.fullmatch(r"\d+", str(label)) or int(label) >= labels:
        raise ValueError(f"the label {label!r} is not a number from 0 to {labels - 1}")
    return int(label)


def to_text(value: Any) -> str:
    """Return a value that must be non-empty text. Raises ValueError for anything else."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a column is empty or not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("a column has half a surrogate pair, which is not valid text") from None
    return value
