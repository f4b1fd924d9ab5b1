"""Near-duplicates across a whole corpus by MinHash, in bounded memory: what is not read spills to disk.

The likeness of two texts is the Jaccard similarity of their sets of word 5-grams, in lower case, as is usual for web text (RefinedWeb and
FineWeb take word 5-grams too). A punctuation mark is a word, for regular expressions and code, and so is an ideograph; texts are padded, so
that every word stands in five 5-grams. The likeness of two records is that of their least alike views. At the default threshold of 0.8 a
text of up to 40 words thus has no near-duplicate but itself in other case or spacing, and a longer one may differ by a word per 45. Records
made from one template with other words in it, such as questions to a database, stay: of the 7,911 different NL-RX training records and
of Spider's 6,582 this drops none. Character 5-grams over all views together drop 1,430 and 234, and over each view 657 and 33; word
5-grams over all views together 74 and 10.

The rule: a record is dropped if an earlier one is near it, in the order (split, unit, ordinal) of `duplicates.SPLIT_PRIORITY`, whether or not that
one is dropped itself for a still earlier one. Near means: one of the bands of their sketches is equal, which finds 98% or more of the pairs
at the threshold and nearly all above it, and the likeness estimated from 128 hashes, with a standard error of up to 0.04, reaches the
threshold. This depends neither on the order of work nor on the number of parts. A band shared by more than 100,000 records is cut into runs
of so many, and records are compared within their run.
"""

import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.console import UserError
from data_prep.files import atomic_path
from data_prep.selection.duplicates import equal_groups, write_dropped, write_fingerprints

DEFAULT_THRESHOLD = 0.8
NUM_HASHES = 128
RECALL = 0.98
"""Share of the pairs at the threshold that a sketch's bands find."""
LARGEST_GROUP = 100_000
"""Records compared at a time; their signatures take 25 MB for each view."""
_WORDS = 5
_WORD = re.compile(r"[^\W\u2e80-\U0010ffff]+|\S")
_FACTORS = np.random.default_rng(128).integers(0, 2**64, (3, NUM_HASHES), dtype=np.uint64) | np.uint64(1)


def minhash_library() -> Any:
    """Return rensa's MinHash class. Raises UserError where the package is not installed."""
    # A preparation has a process per core; read when rensa first makes its threads.
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    try:
        from rensa import RMinHash
    except ImportError:
        raise UserError(
            "near-duplicates need the package rensa, which is not installed: "
            "run pip install '.[near-duplicates]' in the checkout, or leave them out"
        ) from None
    return RMinHash


def num_bands(threshold: float) -> int:
    """Number of bands of a sketch: as few, that is of as many hashes, as find RECALL of the pairs at the threshold.

    A pair of likeness s shares a band of r hashes with the chance s^r. `duplicates.num_parts` takes this times the records.
    """
    rows = max(
        rows
        for rows in range(1, NUM_HASHES + 1)
        if rows == 1 or 1 - (1 - threshold**rows) ** (NUM_HASHES // rows) >= RECALL
    )
    return NUM_HASHES // rows


def sketch(records: list[tuple[str, ...]], threshold: float = DEFAULT_THRESHOLD) -> tuple[np.ndarray, np.ndarray]:
    """Signatures and bands of records that all have V views, "" where one is lacking: (N, V, 128) uint16 and (N, bands, 2) uint64.

    Together some 300 bytes a record and 256 a view. Raises UserError where rensa is not installed.
    """
    views = len(records[0]) if records else 0
    shingles, ends = _shingles(
        [view for record in records for view in record], np.tile(np.arange(views, dtype=np.uint64), len(records))
    )
    each = _minhash(shingles, ends).reshape(len(records), views, NUM_HASHES)
    # The shingles of all views together are never less alike than the least alike views, so that bands of them miss no pair.
    together = _minhash(shingles, ends[:: max(views, 1)]).astype(np.uint64)
    bands = num_bands(threshold)
    rows = NUM_HASHES // bands
    split = together[:, : bands * rows].reshape(len(records), bands, rows)
    keys = [
        (split * factors[:rows]).sum(axis=2, dtype=np.uint64) + np.arange(bands, dtype=np.uint64) * factors[-1]
        for factors in _FACTORS[:2]
    ]
    # The low 16 bits of equal hashes are equal, and of others once in 65,536: good enough to compare, and half the disk.
    return each.astype(np.uint16), np.stack(keys, axis=2)


def _minhash(shingles: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The hashes of each set `shingles[ends[i]:ends[i + 1]]`: (N, 128) uint32."""
    digest, hashes = (
        minhash_library().digest_matrix_from_flat_token_hashes,
        np.empty((len(ends) - 1, NUM_HASHES), np.uint32),
    )
    for start in range(
        0, len(hashes), 256
    ):  # they come as lists of Python's integers, which should not leave the cache
        some = ends[start : start + 257]
        hashes[start : start + 256] = digest(
            shingles[some[0] : some[-1]], np.ascontiguousarray(some - some[0]), NUM_HASHES, 1
        ).to_rows()
    return hashes


def _shingles(texts: list[str], seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of the word 5-grams of each text, and where each ends: (S,) uint64, and (N + 1,) uint64 that starts with 0.

    Equal 5-grams of texts with another seed differ. A text without words has none.
    """
    found = [_WORD.findall(text.lower()) for text in texts]
    hashes = {word: zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in set().union(*found)}
    counts = np.array([len(words) for words in found], np.int64)
    lengths = np.where(counts, counts + _WORDS - 1, 0)
    ends = np.append(0, np.cumsum(lengths))
    # Between two texts stand four zeros, so each 5-gram is of one text and the edges around it.
    words = np.zeros(ends[-1] + _WORDS - 1, np.uint64)
    inside = np.arange(counts.sum()) + np.repeat(ends[:-1] - np.append(0, np.cumsum(counts))[:-1] + _WORDS - 1, counts)
    words[inside] = [hashes[word] for words in found for word in words]
    shingles = np.repeat(seeds, lengths) * _FACTORS[2, -1]
    for place in range(_WORDS):
        shingles += words[place : place + len(shingles)] * _FACTORS[2, place]
    return shingles ^ shingles >> np.uint64(32), ends.astype(np.uint64)


def write_sketches(
    signatures_path: Path,
    bands_path: Path,
    signatures: np.ndarray,
    bands: np.ndarray,
    ordinals: np.ndarray,
    ranks: np.ndarray,
) -> None:
    """Write the sketches of one unit's records, each file in one atomic step, for `resolve_near`.

    `signatures` (N, V, 128) and `bands` (N, bands, 2) come from `sketch`; `ordinals` (N,), ascending, and `ranks` (N,) are those of
    `duplicates.write_fingerprints`.
    """
    rows = np.empty(len(ordinals), _row(signatures.shape[1]))
    rows["ordinal"], rows["signature"] = ordinals, signatures
    with atomic_path(signatures_path) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)
    count = bands.shape[1]
    write_fingerprints(
        bands_path, bands.reshape(-1, 2), np.repeat(np.arange(len(ordinals)), count), np.repeat(ranks, count)
    )


def _row(views: int) -> np.dtype:
    return np.dtype([("ordinal", "<u8"), ("signature", "<u2", (views, NUM_HASHES))])


def resolve_near(
    signature_paths: list[Path],
    band_paths: list[Path],
    part: int,
    parts: int,
    out: Path,
    threshold: float = DEFAULT_THRESHOLD,
) -> None:
    """Write which records one part of the bands drops, as `duplicates.resolve` does; `duplicates.dropped` reads it.

    `signature_paths[unit]` and `band_paths[unit]` are the unit's files from `write_sketches`, made with the same threshold.
    """
    found = equal_groups(band_paths, part, parts)
    sizes = _cut(found.sizes)
    units, ordinals = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        start = int(ends[first] - sizes[first])
        last = max(first + 1, int(np.searchsorted(ends, start + LARGEST_GROUP, side="right")))
        members = slice(start, int(ends[last - 1]))
        rows = _read(signature_paths, found.units[members], found.ordinals[members])
        near = _near_an_earlier(rows["signature"], sizes[first:last], threshold)
        units.append(found.units[members][near])
        ordinals.append(rows["ordinal"][near].astype(np.int64))
        first = last
    write_dropped(out, np.concatenate(units), np.concatenate(ordinals))


def _cut(sizes: np.ndarray) -> np.ndarray:
    """Sizes of the groups, those above LARGEST_GROUP cut into runs."""
    runs = -(-sizes // LARGEST_GROUP)
    cut = np.full(runs.sum(), LARGEST_GROUP, np.int64)
    cut[np.cumsum(runs) - 1] = sizes - (runs - 1) * LARGEST_GROUP
    return cut


def _read(paths: list[Path], units: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The given row of the given unit's file of signatures, for each of N records: (N,) of `_row`."""
    order = np.lexsort((rows, units))  # a file is read from front to back
    known, starts = np.unique(units[order], return_index=True)
    parts = []
    for unit, places in zip(known.tolist(), np.split(order, starts[1:]), strict=True):
        parts.append(np.load(paths[unit], mmap_mode="r")[rows[places]])
    found = np.concatenate(parts)
    return found[np.argsort(order)]


def _near_an_earlier(signatures: np.ndarray, sizes: np.ndarray, threshold: float) -> np.ndarray:
    """Which records are near an earlier one of their group: (N, V, 128), (G,) -> (N,) bool."""
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    places = np.arange(len(starts)) - starts
    near = np.zeros(len(starts), bool)
    open_ones = np.flatnonzero(
        places > 0
    )  # not yet near an earlier one; all are compared with the first of their group, the second, ...
    leader = 0
    while len(open_ones):
        same = signatures[open_ones] == signatures[starts[open_ones] + leader]
        hit = (same.mean(axis=2) >= threshold).all(axis=1)
        near[open_ones[hit]] = True
        leader += 1
        open_ones = open_ones[~hit]
        open_ones = open_ones[places[open_ones] > leader]
    return near
