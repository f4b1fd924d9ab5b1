"""Conversion of row values to text."""

import json
import math
from typing import Any


class NotTextError(Exception):
    """Error raised for a value that is not text; the message is one line that names the column."""


def to_text(value: Any, column: str) -> str | None:
    """Return a value as text, None for null. Raises NotTextError for a value that is not text.

    A number or a boolean is written as in JSON.
    """
    if value is None:
        return None
    if isinstance(value, bool | int | float):
        if isinstance(value, float) and not math.isfinite(value):
            raise NotTextError(f"{column!r} holds {value}, not a finite number")
        return json.dumps(value)
    if isinstance(value, bytes):
        raise NotTextError(f"{column!r} holds bytes that are not UTF-8 text")
    if not isinstance(value, str):
        raise NotTextError(f"{column!r} holds a value of type {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise NotTextError(f"{column!r} holds a lone surrogate, which is not valid text") from None
    return value
