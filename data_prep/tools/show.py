"""Display of records and their tokens on a terminal."""

import unicodedata

import numpy as np

from data_prep.tokenizer import Tokenizer

ID_GAP = 2
"""Number of blanks between two pieces."""


def printable(text: str) -> str:
    """Return the text with all non-printable characters escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def display_width(text: str) -> int:
    """Return the number of terminal columns of a printable text."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def padded(text: str, width: int) -> str:
    """Return the text, padded with blanks to `width` columns."""
    return text + " " * (width - display_width(text))


def shortened(text: str, room: int) -> str:
    """Return the text in at most `room` columns. The middle of a longer text is replaced by an ellipsis."""
    if display_width(text) <= room:
        return text
    tail = _fitting(text[::-1], (room - 1) // 3)[::-1]
    return _fitting(text, room - 1 - display_width(tail)) + "…" + tail


def _fitting(text: str, room: int) -> str:
    while display_width(text) > room:
        text = text[: max(room, 0)] if len(text) > room else text[:-1]
    return text


def show_record(tokenizer: Tokenizer, number: int, views: dict[str, np.ndarray], width: int) -> str:
    """Return a record for display: for each view its text, then its pieces above their ids.

    Lines have at most `width` columns. `views` maps names to token ids; the record lacks a view without tokens.
    """
    total = sum(len(ids) for ids in views.values())
    lines = [f"record {number}: {total:,} tokens"]
    for name, ids in views.items():
        if not len(ids):
            lines.append(f"  {name}: null (missing in this record)")
            continue
        text = tokenizer.decode(ids)
        lines.append(
            f"  {name}: {len(ids):,} tokens, {len(text):,} characters, {len(text) / len(ids):.2f} characters per token"
        )
        lines += [f"    {line}" for line in _wrapped(printable(text), width - 4)]
        lines += [f"    {line}" for line in _pieces(tokenizer, ids, width - 4)]
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    lines = []
    while text:
        lines.append(_fitting(text, width))
        text = text[len(lines[-1]) :]
    return lines


def _pieces(tokenizer: Tokenizer, ids: np.ndarray, width: int) -> list[str]:
    """Return lines of pieces above their ids, aligned in columns."""
    lines, above, below = [], "", ""
    for token in ids.tolist():
        piece = printable(tokenizer.piece(token))
        room = max(display_width(piece), len(str(token)))
        if below and len(below) + room > width:
            lines += [above.rstrip(), below.rstrip()]
            above = below = ""
        above, below = above + padded(piece, room + ID_GAP), below + padded(str(token), room + ID_GAP)
    return [*lines, above.rstrip(), below.rstrip()]
