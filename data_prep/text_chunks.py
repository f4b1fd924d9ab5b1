"""Splitting of long texts at positions that do not change their tokens."""

import itertools
from collections.abc import Callable, Iterator

CHUNK_CHARACTERS = 1 << 20
"""Maximum number of characters that are tokenized at once. This bounds the memory of the tokenizer."""
MARGIN_CHARACTERS = 1000
"""Number of characters on each side of a position that are tokenized to test whether the text can be split there."""
MAX_CANDIDATES = 20
"""Maximum number of positions of each kind that are tested."""
Encode = Callable[[list[str]], list[list[int]]]


def chunk_text(text: str, encode: Encode) -> list[str]:
    """Return the chunks of a text. Their tokens under `encode`, concatenated, are the tokens of the text.

    If no position for a split is found, the rest of the text is one chunk.
    """
    chunks, begin = [], 0
    while len(text) - begin > CHUNK_CHARACTERS:
        position = next((position for position in _candidates(text, begin) if _can_split(text, position, encode)), None)
        if position is None:
            break
        chunks.append(text[begin:position])
        begin = position
    return [*chunks, text[begin:]]


def _candidates(text: str, begin: int) -> Iterator[int]:
    """Yield positions where the chunk from `begin` may end, the best first: after a line, before a blank, anywhere."""
    end = begin + CHUNK_CHARACTERS
    for separator, offset in (("\n", 1), (" ", 0)):
        position = end
        for _ in range(MAX_CANDIDATES):
            position = text.rfind(separator, begin + 1, position)
            if position < 0:
                break
            yield position + offset
    yield from itertools.islice(range(end, begin, -1), MAX_CANDIDATES)


def _can_split(text: str, position: int, encode: Encode) -> bool:
    """Return whether a split at a position leaves the tokens around it unchanged.

    This is never the case with a tokenizer that puts a blank in front of every text.
    """
    before, after = text[max(0, position - MARGIN_CHARACTERS) : position], text[position : position + MARGIN_CHARACTERS]
    joined, left, right = encode([before + after, before, after])
    return joined == left + right
