"""Records that give away the test questions of the evaluation tasks.

Texts are compared by their letters and digits alone, in lower case and without accents (`normalized_letters`). A
record is contaminated in either of two cases:

- A view of its context equals a test context. The context of a record is all of its present views except the last.
  The context of a plain record is the document itself.
- One of its views shares a stretch of 70 letters (about 14 words) with a test context. An ideograph or kana counts
  as three letters.

Test targets are ignored: two questions with the same answer are not contamination.

The GPT-4 report compares 50 letters, the GPT-3 paper 13 words. The number of training records that each rule drops:

    data set                          records  50 letters  13 words  60 letters  70 letters
    NL-RX (templates; 39 are in test)   8,000         807       430         150          40
    Spider                              6,587         209        49                      22
    GSM8K                               7,473           5         4                       3
    MRPC (news pairs)                   4,076         181       153                     117

A test sentence of MRPC often occurs word for word in a training pair. A limit of 70 letters therefore drops
verbatim copies and keeps records that only share a template. If the stretch must also cover half of the test
context, none of these counts changes by more than 1.

A phrase in very many test contexts, such as a fixed instruction before each question, identifies none of them. It
would drop every training record with the same instruction. Phrases of 30 letters are therefore masked if they occur
in more than 5% of the test contexts and in more than 10 of them. This changes nothing on the data sets above.
"""

import unicodedata
from collections.abc import Iterable
from functools import cache

import numpy as np

OVERLAP_LETTERS = 70
"""Length of a stretch that a record must not share with a test context, in letters."""
PHRASE_LETTERS = 30
COMMON_CONTEXTS, COMMON_SHARE = 10, 0.05
"""Number and fraction of test contexts. A phrase of PHRASE_LETTERS letters is masked if the number of contexts with
it exceeds both."""

_STEP = 8
_BLOCK = OVERLAP_LETTERS - _STEP + 1 - (OVERLAP_LETTERS - _STEP + 1) % 8
"""Length of the blocks that are looked up in training text: every stretch contains a block of this length that
starts at a multiple of _STEP."""
_FACTORS = np.random.default_rng(70).integers(0, 2**64, 16, dtype=np.uint64) | np.uint64(1)

_LOWERCASE = bytes(ord(chr(code).lower()) if code < 128 else code for code in range(256))
_IGNORED_BYTES = bytes(code for code in range(1, 128) if not chr(code).isalnum())


class Contamination:
    """Index of the test contexts of all tasks. It takes about 30 bytes for each letter, and at least 64 KB."""

    def __init__(self, contexts: Iterable[str]) -> None:
        texts = list(dict.fromkeys(contexts))
        normalized = _units(texts)
        self._texts, self._normalized = texts, set(normalized) - {b""}
        self._equal = {normalized_letters(text): text for text in reversed(texts)}
        joined = b"\0".join(normalized)
        self._text_starts = _text_starts(normalized)
        self._units = _mask_common_phrases(joined, self._text_starts)
        stretches = _stretches_without_nul(self._units, OVERLAP_LETTERS)
        hashes = _hashes(self._units, stretches, OVERLAP_LETTERS)
        self._hashes, first = np.unique(hashes, return_index=True)
        self._stretch_starts = stretches[first]
        starts = np.unique(np.add.outer(stretches, np.arange(_STEP)))
        bits = min(26, max(16, int(16 * len(starts)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._block_hashes = np.unique(_hashes(self._units, starts, _BLOCK))
        self._blocks = np.zeros(1 << bits, bool)
        self._blocks[self._block_hashes >> self._shift] = True

    def find(self, batch: list[tuple[str, ...]]) -> list[str]:
        """Return a line for each record that names what it shares with which test context; "" for a clean one.

        `batch` contains the views of each record, "" for a view that the record lacks. Batches of about a megabyte of
        text are fastest.
        """
        lines = [""] * len(batch)
        if not self._normalized:
            return lines
        normalized = _units([view for views in batch for view in views])
        equal = self._normalized.intersection(normalized)
        shared = self._shared_stretches(normalized)
        if not equal and not shared:
            return lines
        ends = np.cumsum([len(views) for views in batch])
        for index, normalized_text in enumerate(normalized):
            if normalized_text not in equal:
                continue
            record = int(np.searchsorted(ends, index, side="right"))
            view = index - int(ends[record]) + len(batch[record])
            text = self._equal.get(normalized_letters(batch[record][view]))
            if text is not None and view in _context_views(batch[record]):
                lines[record] = lines[record] or f"equals the test context {_excerpt(text)}"
        for index, position in shared.items():
            record = int(np.searchsorted(ends, index, side="right"))
            lines[record] = lines[record] or self._describe(position)
        return lines

    def _shared_stretches(self, normalized: list[bytes]) -> dict[int, int]:
        """Return the texts that share a stretch with a test context: text index -> start of the stretch in `_units`."""
        units = b"\0".join(normalized)
        words = np.frombuffer(units, "<u8", len(units) // 8)
        count = len(words) - _BLOCK // 8 + 1
        if not len(self._stretch_starts) or count < 1:
            return {}
        hashes, product = np.zeros(count, np.uint64), np.empty(count, np.uint64)
        for number in range(_BLOCK // 8):
            hashes += np.multiply(words[number : number + count], _FACTORS[number], out=product)
        hits = np.flatnonzero(self._blocks[hashes >> self._shift])  # the table excludes nearly all positions
        hits = hits[_find_sorted(self._block_hashes, hashes[hits]) >= 0]
        starts = np.unique(np.subtract.outer(hits * _STEP, np.arange(_STEP)))
        starts = starts[(starts >= 0) & (starts <= len(units) - OVERLAP_LETTERS)]
        rows = _find_sorted(self._hashes, _hashes(units, starts, OVERLAP_LETTERS))
        starts, positions = starts[rows >= 0], self._stretch_starts[rows[rows >= 0]]
        inside = np.arange(OVERLAP_LETTERS)
        same = (
            np.frombuffer(units, np.uint8)[starts[:, None] + inside]
            == np.frombuffer(self._units, np.uint8)[positions[:, None] + inside]
        )
        starts, positions = starts[same.all(axis=1)], positions[same.all(axis=1)]
        indices, first = np.unique(
            np.searchsorted(_text_starts(normalized), starts, side="right") - 1, return_index=True
        )
        return dict(zip(indices.tolist(), positions[first].tolist(), strict=True))

    def _describe(self, position: int) -> str:
        number = int(np.searchsorted(self._text_starts, position, side="right")) - 1
        text = self._texts[number]
        before = position - int(self._text_starts[number])
        ends = np.cumsum([len(_unit(character)) for character in text.replace("\0", "")])
        start, stop = np.searchsorted(ends, before, side="right"), np.searchsorted(ends, before + OVERLAP_LETTERS) + 1
        stretch = " ".join(text.replace("\0", "")[start:stop].split())
        return f"shares {stretch!r} with the test context {_excerpt(text)}"


def normalized_letters(text: str) -> str:
    """Return the letters and digits of a text in any script, in lower case and without accents.

    Vowel signs of Indic scripts are kept.
    """
    return "".join(map(_letters, text))


@cache
def _letters(character: str) -> str:
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    return "".join(c for c in folded if c.isalnum() or (c >= "\u0900" and unicodedata.category(c)[0] == "M"))


def _units(texts: list[str]) -> list[bytes]:
    """Return the letters and digits of each text as non-zero bytes.

    An ASCII character is its own byte; for others see `_unit`.
    """
    joined = "\0".join(texts)
    if joined.count("\0") >= max(len(texts), 1):
        joined = "\0".join(text.replace("\0", "") for text in texts)
    data = joined.encode("utf-8", "surrogatepass")
    if len(data) > 1.25 * len(joined):
        data = _units_by_table(data).replace(b"\1", b"\0")
    elif len(data) > len(joined):
        data = _replace_non_ascii(data)
    return data.translate(_LOWERCASE, _IGNORED_BYTES).split(b"\0")


def _replace_non_ascii(data: bytes) -> bytes:
    """Return mostly-ASCII UTF-8 with every other character replaced by its units."""
    non_ascii = np.flatnonzero(np.frombuffer(data, np.int8) < 0)
    ends = np.flatnonzero(np.diff(non_ascii) > 1)
    starts, stops = non_ascii[np.append(0, ends + 1)].tolist(), (non_ascii[np.append(ends, -1)] + 1).tolist()
    replaced = _units_by_table(b"\0".join([data[start:stop] for start, stop in zip(starts, stops, strict=True)])).split(
        b"\1"
    )
    parts: list[bytes] = []
    before = 0
    for start, stop, units in zip(starts, stops, replaced, strict=True):
        parts += (data[before:start], units)
        before = stop
    return b"".join([*parts, data[before:]])


def _units_by_table(data: bytes) -> bytes:
    """Return the units of UTF-8, character by character; a NUL becomes a byte 1."""
    codes = np.frombuffer(data.decode("utf-8", "surrogatepass").encode("utf-32-le", "surrogatepass"), "<u4")
    values = _CODES[codes]
    if not values.all():
        for code in np.unique(codes[values == 0]).tolist():
            _CODES[code] = int.from_bytes((_unit(chr(code)) if code else b"\1").ljust(3, b"\0") + b"\1", "little")
        values = _CODES[codes]
    unit_bytes = values.view(np.uint8).reshape(-1, 4)[:, :3]
    units: bytes = unit_bytes[unit_bytes != 0].tobytes()
    return units


@cache
def _unit(character: str) -> bytes:
    """Return the bytes for a character: at most three, and none if it is not a letter or digit.

    An ASCII letter is its own byte. A letter of a different alphabet is hashed to a byte from 128 on, and 70 equal
    hashes in a row are practically never chance. A character from U+2E80 on carries about as much information as
    three letters. Three bytes hold it exactly.
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


# Units by code point, with a 1 in the highest byte once they are known. Untouched memory pages cost nothing.
_CODES = np.zeros(0x110000, "<u4")


def _text_starts(normalized: list[bytes]) -> np.ndarray:
    """Return the start of each text when the texts are joined with a NUL between them: (N,) int64."""
    lengths = np.fromiter(map(len, normalized), np.int64, len(normalized)) + 1
    return np.cumsum(lengths) - lengths


def _mask_common_phrases(joined: bytes, starts: np.ndarray) -> bytes:
    """Return the test contexts with a NUL for every letter of a phrase that very many of them share."""
    phrase_starts = _stretches_without_nul(joined, PHRASE_LETTERS)
    hashes = _hashes(joined, phrase_starts, PHRASE_LETTERS)
    contexts = np.searchsorted(starts, phrase_starts, side="right")
    order = np.lexsort((contexts, hashes))
    hashes, contexts = hashes[order], contexts[order]
    new_hash = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
    new_context = new_hash | np.append(True, contexts[1:] != contexts[:-1])[: len(hashes)]
    number = np.cumsum(new_hash) - 1
    common = np.bincount(number, weights=new_context) > max(COMMON_CONTEXTS, COMMON_SHARE * len(starts))
    cut = np.zeros(len(joined) + 1, np.int64)
    masked_starts = phrase_starts[order][common[number]]
    np.add.at(cut, masked_starts, 1)
    np.add.at(cut, masked_starts + PHRASE_LETTERS, -1)
    return np.where(np.cumsum(cut[:-1]) > 0, 0, np.frombuffer(joined, np.uint8)).astype(np.uint8).tobytes()


def _stretches_without_nul(units: bytes, length: int) -> np.ndarray:
    """Return the starts of the stretches of `length` bytes that contain no NUL: (N,) int64."""
    before = np.append(0, np.cumsum(np.frombuffer(units, np.uint8) == 0))
    return np.flatnonzero(before[length:] == before[:-length])


def _hashes(units: bytes, starts: np.ndarray, length: int) -> np.ndarray:
    """Return a 64-bit hash of the stretch of `length` bytes at each start.

    The hash is a weighted sum of 8-byte words; the last two words may overlap.
    """
    hashes = np.zeros(len(starts), np.uint64)
    if len(starts):
        words = np.ndarray((len(units) - 7,), "<u8", units, strides=(1,))
        for number, offset in enumerate([*range(0, length - 7, 8), length - 8][: -(-length // 8)]):
            hashes += words[starts + offset] * _FACTORS[number]
    return hashes


def _find_sorted(sorted_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the index of each value in a sorted, non-empty array, or -1: (N,) int64."""
    indices = np.minimum(np.searchsorted(sorted_values, values), len(sorted_values) - 1)
    return np.where(sorted_values[indices] == values, indices, -1)


def _context_views(views: tuple[str, ...]) -> list[int]:
    present = [number for number, view in enumerate(views) if view]
    return present[:-1] or present


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 100 else line[:99] + "…")
