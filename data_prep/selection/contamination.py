"""Records that give away the test questions of the evaluation tasks.

Texts are compared by their normalized_letters and digits alone, in lower case and without accents (`normalized_letters`). A record is contaminated if

- a view of its context equals a test context. The context is every view but the last of those that the record has, and the document
  itself for a plain one; or
- any of its views shares a stretch of 70 letters with a test context, some 14 words; an ideograph, kana or the like counts three.

The targets of the test are never looked at: that two questions have the same answer is no contamination.

GPT-4's report takes 50 letters, GPT-3's takes 13 words. On NL-RX, whose descriptions come from a few templates and of which 39 training
records of 8,000 stand in the test, 50 letters drop 807 records, 13 words 430, 60 letters 150, and 70 letters 40. Of Spider's 6,587 records
50 letters drop 209, 13 words 49, and 70 letters 22, of GSM8K's 7,473 they drop 5, 4 and 3, and of MRPC's 4,076 news pairs, where a
sentence of the test often stands in a training pair word for word, 181, 153 and 117. So at 70 letters what is verbatim goes, and what
comes from the same template stays. Asking in addition that the stretch covers half of the test context changes none of these by more than 1.

A phrase that stands in very many test contexts, such as a fixed instruction before each question, tells nothing about one of them; left in,
it would drop every training record with the same instruction. Phrases of 30 letters that stand in more than 5% of the test contexts (and in
more than 10) are therefore cut out before stretches are taken. On the data sets above this changes nothing.
"""

import unicodedata
from collections.abc import Iterable
from functools import cache

import numpy as np

OVERLAP_LETTERS = 70
"""Letters in a row that a record must not share with a test context."""
PHRASE = 30
COMMON_CONTEXTS, COMMON_SHARE = 10, 0.05
"""A phrase of so many letters is cut out of the test contexts where it stands in more of them than both."""

_STEP = 8
_BLOCK = OVERLAP_LETTERS - _STEP + 1 - (OVERLAP_LETTERS - _STEP + 1) % 8
"""Every stretch holds a block of this length that starts at a multiple of _STEP, so only those are looked up in the training text."""
_FACTORS = np.random.default_rng(70).integers(0, 2**64, 16, dtype=np.uint64) | np.uint64(1)

_LOWER = bytes(ord(chr(code).lower()) if code < 128 else code for code in range(256))
_OTHERS = bytes(code for code in range(1, 128) if not chr(code).isalnum())


class Contamination:
    """The test contexts of all tasks, indexed once; memory is some 30 bytes a letter of them, and at least 64 KB."""

    def __init__(self, contexts: Iterable[str]) -> None:
        texts = list(dict.fromkeys(contexts))
        forms = _units(texts)
        self._texts, self._forms = texts, set(forms) - {b""}
        self._equal = {normalized_letters(text): text for text in reversed(texts)}
        joined = b"\0".join(forms)
        self._starts = _starts(forms)
        self._units = _without_common_phrases(joined, self._starts)
        stretches = _free_of_nul(self._units, OVERLAP_LETTERS)
        hashes = _hashes(self._units, stretches, OVERLAP_LETTERS)
        self._hashes, first = np.unique(hashes, return_index=True)
        self._places = stretches[first]
        starts = np.unique(np.add.outer(stretches, np.arange(_STEP)))
        bits = min(26, max(16, int(16 * len(starts)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._block_hashes = np.unique(_hashes(self._units, starts, _BLOCK))
        self._blocks = np.zeros(1 << bits, bool)
        self._blocks[self._block_hashes >> self._shift] = True

    def find(self, batch: list[tuple[str, ...]]) -> list[str]:
        """One line for each record that says what it shares with which test context; "" for a clean one.

        `batch` holds the views of each record, "" for one that it lacks. A megabyte of text at a time is fastest.
        """
        found = [""] * len(batch)
        if not self._forms:
            return found
        forms = _units([view for views in batch for view in views])
        equal = self._forms.intersection(forms)
        shared = self._shared_stretches(forms)
        if not equal and not shared:
            return found
        ends = np.cumsum([len(views) for views in batch])
        for place in [place for place, form in enumerate(forms) if form in equal]:
            record = int(np.searchsorted(ends, place, side="right"))
            number = place - int(ends[record]) + len(batch[record])
            text = self._equal.get(normalized_letters(batch[record][number]))
            if text is not None and number in _context_views(batch[record]):
                found[record] = found[record] or f"equals the test context {_excerpt(text)}"
        for place, position in shared.items():
            record = int(np.searchsorted(ends, place, side="right"))
            found[record] = found[record] or self._describe(position)
        return found

    def _shared_stretches(self, forms: list[bytes]) -> dict[int, int]:
        """The forms that share a stretch with a test context, in order: the number of the form -> the stretch's place in the contexts."""
        units = b"\0".join(forms)
        words = np.frombuffer(units, "<u8", len(units) // 8)
        count = len(words) - _BLOCK // 8 + 1
        if not len(self._places) or count < 1:
            return {}
        hashes, product = np.zeros(count, np.uint64), np.empty(count, np.uint64)
        for number in range(_BLOCK // 8):
            hashes += np.multiply(words[number : number + count], _FACTORS[number], out=product)
        hits = np.flatnonzero(self._blocks[hashes >> self._shift])  # few: the table says no to nearly all
        hits = hits[_which(self._block_hashes, hashes[hits]) >= 0]
        starts = np.unique(np.subtract.outer(hits * _STEP, np.arange(_STEP)))
        starts = starts[(starts >= 0) & (starts <= len(units) - OVERLAP_LETTERS)]
        rows = _which(self._hashes, _hashes(units, starts, OVERLAP_LETTERS))
        starts, positions = starts[rows >= 0], self._places[rows[rows >= 0]]
        inside = np.arange(OVERLAP_LETTERS)
        same = (
            np.frombuffer(units, np.uint8)[starts[:, None] + inside]
            == np.frombuffer(self._units, np.uint8)[positions[:, None] + inside]
        )
        starts, positions = starts[same.all(axis=1)], positions[same.all(axis=1)]
        places, first = np.unique(np.searchsorted(_starts(forms), starts, side="right") - 1, return_index=True)
        return dict(zip(places.tolist(), positions[first].tolist(), strict=True))

    def _describe(self, position: int) -> str:
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        text, before = self._texts[number], position - int(self._starts[number])
        ends = np.cumsum([len(_unit(character)) for character in text.replace("\0", "")])
        start, stop = np.searchsorted(ends, before, side="right"), np.searchsorted(ends, before + OVERLAP_LETTERS) + 1
        stretch = " ".join(text.replace("\0", "")[start:stop].split())
        return f"shares {stretch!r} with the test context {_excerpt(text)}"


def normalized_letters(text: str) -> str:
    """The letters and digits of a text in any script, in lower case and without accents; vowel signs of Indic scripts stay."""
    return "".join(map(_letters, text))


@cache
def _letters(character: str) -> str:
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    return "".join(c for c in folded if c.isalnum() or (c >= "\u0900" and unicodedata.category(c)[0] == "M"))


def _units(texts: list[str]) -> list[bytes]:
    """Of each text the letters and digits, as bytes of any value but 0: an ASCII one as itself, others as `_unit` says."""
    joined = "\0".join(texts)
    if joined.count("\0") >= max(len(texts), 1):
        joined = "\0".join(text.replace("\0", "") for text in texts)
    data = joined.encode("utf-8", "surrogatepass")
    if len(data) > 1.25 * len(joined):
        data = _table_units(data).replace(b"\1", b"\0")
    elif len(data) > len(joined):
        data = _with_foreign_units(data)
    return data.translate(_LOWER, _OTHERS).split(b"\0")


def _with_foreign_units(data: bytes) -> bytes:
    """UTF-8 that is mostly ASCII, with their units in the place of the other characters."""
    foreign = np.flatnonzero(np.frombuffer(data, np.int8) < 0)
    ends = np.flatnonzero(np.diff(foreign) > 1)
    starts, stops = foreign[np.append(0, ends + 1)].tolist(), (foreign[np.append(ends, -1)] + 1).tolist()
    replaced = _table_units(b"\0".join([data[start:stop] for start, stop in zip(starts, stops, strict=True)])).split(
        b"\1"
    )
    parts: list[bytes] = []
    before = 0
    for start, stop, units in zip(starts, stops, replaced, strict=True):
        parts += (data[before:start], units)
        before = stop
    return b"".join([*parts, data[before:]])


def _table_units(data: bytes) -> bytes:
    """The units of UTF-8, character by character; a NUL becomes a byte 1."""
    codes = np.frombuffer(data.decode("utf-8", "surrogatepass").encode("utf-32-le", "surrogatepass"), "<u4")
    values = _CODES[codes]
    if not values.all():
        for code in np.unique(codes[values == 0]).tolist():
            _CODES[code] = int.from_bytes((_unit(chr(code)) if code else b"\1").ljust(3, b"\0") + b"\1", "little")
        values = _CODES[codes]
    several = values.view(np.uint8).reshape(-1, 4)[:, :3]
    units: bytes = several[several != 0].tobytes()
    return units


@cache
def _unit(character: str) -> bytes:
    """What stands for a character of any script: at most three bytes, and none for what is no letter or digit.

    A letter of ASCII stands for itself. One of another alphabet is hashed to a byte from 128 on: 70 in a row only equal others by a miracle.
    From U+2E80 on, where a character says about as much as three letters, three such bytes hold it exactly.
    """
    out = b""
    for code in map(ord, _letters(character)):
        if code < 128:
            out += bytes([code])
        elif code < 0x2E80:
            out += bytes([128 + code * 0x9E3779B1 % 2**32 // 2**25])
        else:
            out += bytes([128 + (code >> shift & 127) for shift in (14, 7, 0)])
    return out[:3]


_CODES = np.zeros(
    0x110000, "<u4"
)  # of a code point its units, and a 1 above them once they are known; pages never touched take no memory


def _starts(forms: list[bytes]) -> np.ndarray:
    """Where each form starts when all are joined with a NUL between them: (N,) int64."""
    lengths = np.fromiter(map(len, forms), np.int64, len(forms)) + 1
    return np.cumsum(lengths) - lengths


def _without_common_phrases(joined: bytes, starts: np.ndarray) -> bytes:
    """The test contexts with a NUL for every letter of a phrase that very many of them share."""
    places = _free_of_nul(joined, PHRASE)
    hashes = _hashes(joined, places, PHRASE)
    contexts = np.searchsorted(starts, places, side="right")
    order = np.lexsort((contexts, hashes))
    hashes, contexts = hashes[order], contexts[order]
    new_hash = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
    new_context = new_hash | np.append(True, contexts[1:] != contexts[:-1])[: len(hashes)]
    number = np.cumsum(new_hash) - 1
    common = np.bincount(number, weights=new_context) > max(COMMON_CONTEXTS, COMMON_SHARE * len(starts))
    cut = np.zeros(len(joined) + 1, np.int64)
    inside = places[order][common[number]]
    np.add.at(cut, inside, 1)
    np.add.at(cut, inside + PHRASE, -1)
    return np.where(np.cumsum(cut[:-1]) > 0, 0, np.frombuffer(joined, np.uint8)).astype(np.uint8).tobytes()


def _free_of_nul(units: bytes, length: int) -> np.ndarray:
    """Where stretches of a length without a NUL start: (N,) int64."""
    before = np.append(0, np.cumsum(np.frombuffer(units, np.uint8) == 0))
    return np.flatnonzero(before[length:] == before[:-length])


def _hashes(units: bytes, starts: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of the stretch of a length at each start: a weighted sum of its 8-byte words, the last two of which may overlap."""
    hashes = np.zeros(len(starts), np.uint64)
    if len(starts):
        words = np.ndarray((len(units) - 7,), "<u8", units, strides=(1,))
        for number, offset in enumerate([*range(0, length - 7, 8), length - 8][: -(-length // 8)]):
            hashes += words[starts + offset] * _FACTORS[number]
    return hashes


def _which(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The place of each value in a sorted array, which is not empty, or -1: (N,) int64."""
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.where(known[places] == values, places, -1)


def _context_views(views: tuple[str, ...]) -> list[int]:
    present = [number for number, view in enumerate(views) if view]
    return present[:-1] or present


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 100 else line[:99] + "…")
