"""Long texts in stretches, cut only where the tokenizer makes the same tokens of the parts as of the whole."""

import itertools
from collections.abc import Callable, Iterator

CHUNK_CHARACTERS = 1 << 20
"""Characters that the tokenizer gets at once: its memory grows with them."""
AROUND = 1000
"""Characters on both sides of a place on which it is tried whether a text can be cut there."""
TRIED = 20
"""Places of each kind that are tried."""
Encode = Callable[[list[str]], list[list[int]]]


def chunk_text(text: str, encode: Encode) -> list[str]:
    """Return a text in parts, of which `encode` makes the tokens of the whole; in one part from where no place is found to cut it."""
    parts, begin = [], 0
    while len(text) - begin > CHUNK_CHARACTERS:
        place = next((place for place in _places(text, begin) if _can_cut(text, place, encode)), None)
        if place is None:
            break
        parts.append(text[begin:place])
        begin = place
    return [*parts, text[begin:]]


def _places(text: str, begin: int) -> Iterator[int]:
    """Yield places at which the part from `begin` may end, the best first: after a line, before a blank, anywhere."""
    end = begin + CHUNK_CHARACTERS
    for found, moved in (("\n", 1), (" ", 0)):
        place = end
        for _ in range(TRIED):
            place = text.rfind(found, begin + 1, place)
            if place < 0:
                break
            yield place + moved
    yield from itertools.islice(range(end, begin, -1), TRIED)


def _can_cut(text: str, place: int, encode: Encode) -> bool:
    """Return whether the tokens around a place are those before it and those after it. With a blank put before every text they are not."""
    before, after = text[max(0, place - AROUND) : place], text[place : place + AROUND]
    whole, *apart = encode([before + after, before, after])
    return whole == apart[0] + apart[1]
