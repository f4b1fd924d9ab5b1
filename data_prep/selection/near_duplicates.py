"""Near-duplicates across a whole corpus by MinHash in bounded memory: sketches are kept on disk.

The similarity of two texts is the Jaccard similarity of their sets of lowercase word 5-grams, as is usual for web
text (RefinedWeb and FineWeb also use word 5-grams). A punctuation mark is a word, because it matters in regular
expressions and code. An ideograph is a word too. Texts are padded, so each word is in five 5-grams. The similarity
of two records is the lowest similarity of any of their views.

At the default threshold of 0.8, a text of up to 35 words that repeats no 5-gram has no near-duplicates except copies
with different case or spacing, apart from errors of the estimate below. From 36 words on, one word may be added, and
from 41 words on, one word may be replaced. A long text may differ by one replaced word in 45. Records made from one
template with different words, such as questions to a database, are kept: of the 7,911 distinct NL-RX training records
and of the 6,582 of Spider, none is dropped. The alternatives drop more of them: character 5-grams over all views
together 1,430 and 234, character 5-grams over each view 657 and 33, and word 5-grams over all views together 74 and 10.

A record is dropped if an earlier record is near it, in the order (split, unit, ordinal) with the splits ordered as
in `duplicates.SPLIT_PRIORITY`. It does not matter whether that earlier record is dropped itself. Two records are near
if

- their sketches have an equal band (this finds at least 98% of the pairs at the threshold, and nearly all above
  it), and
- their similarity reaches the threshold. It is estimated from 128 hashes, with a standard error of up to 0.04.

The dropped records do not depend on the order of work or the number of parts. A group of more than 100,000 records
with an equal band is split into runs of 100,000, and records are compared within their run.
"""

import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.selection.duplicates import equal_groups, write_dropped, write_fingerprints
from data_prep.utils.console import UserError
from data_prep.utils.files import atomic_path

DEFAULT_THRESHOLD = 0.8
NUM_HASHES = 128
RECALL = 0.98
"""Fraction of the pairs at the threshold that the bands of a sketch find."""
LARGEST_GROUP = 100_000
"""Records compared at a time; their signatures take 25 MB for each view."""
_SHINGLE_WORDS = 5
_WORD = re.compile(r"[^\W\u2e80-\U0010ffff]+|\S")
_FACTORS = np.random.default_rng(128).integers(0, 2**64, (3, NUM_HASHES), dtype=np.uint64) | np.uint64(1)


def minhash_library() -> Any:
    """Return rensa's MinHash class. Raises UserError if the package is not installed."""
    # A preparation already has one process per core. rensa reads this variable when it creates its threads.
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    try:
        from rensa import RMinHash
    except ImportError:
        raise UserError(
            "removing near-duplicates requires the package rensa, which is not installed: "
            "run pip install '.[near-duplicates]' in the project's folder, or disable the removal"
        ) from None
    return RMinHash


def band_shape(threshold: float) -> tuple[int, int]:
    """Return the number of bands of a sketch and of hashes in each: the longest bands with the required recall.

    Every record writes one fingerprint per band, so callers of `duplicates.num_parts` pass records * bands.

    A pair of similarity s shares a band of r hashes with probability s^r. The bands find a fraction of at least RECALL
    of the pairs at the threshold, if the threshold is at least 0.031: lower ones have 128 bands of one hash.
    """
    hashes_per_band = max(
        hashes_per_band
        for hashes_per_band in range(1, NUM_HASHES + 1)
        if hashes_per_band == 1 or 1 - (1 - threshold**hashes_per_band) ** (NUM_HASHES // hashes_per_band) >= RECALL
    )
    return NUM_HASHES // hashes_per_band, hashes_per_band


def sketch(records: list[tuple[str, ...]], threshold: float = DEFAULT_THRESHOLD) -> tuple[np.ndarray, np.ndarray]:
    """Return the signatures (N, V, 128) uint16 and the bands (N, bands, 2) uint64 of records with V views.

    A view that a record lacks is "". The arrays take about 300 bytes a record plus 256 a view. Raises UserError if
    rensa is not installed.
    """
    views = len(records[0]) if records else 0
    shingles, ends = _shingles(
        [view for record in records for view in record], np.tile(np.arange(views, dtype=np.uint64), len(records))
    )
    each = _minhash(shingles, ends).reshape(len(records), views, NUM_HASHES)
    # All views together are at least as similar as the least similar view, so bands of their shingles miss no pair.
    together = _minhash(shingles, ends[:: max(views, 1)]).astype(np.uint64)
    bands, hashes_per_band = band_shape(threshold)
    split = together[:, : bands * hashes_per_band].reshape(len(records), bands, hashes_per_band)
    keys = [
        (split * factors[:hashes_per_band]).sum(axis=2, dtype=np.uint64)
        + np.arange(bands, dtype=np.uint64) * factors[-1]
        for factors in _FACTORS[:2]
    ]
    # The low 16 bits of different hashes are equal once in 65,536. This is precise enough and halves the disk space.
    return each.astype(np.uint16), np.stack(keys, axis=2)


def _minhash(shingles: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the hashes of each set `shingles[ends[i]:ends[i + 1]]`: (N, 128) uint32."""
    digest = minhash_library().digest_matrix_from_flat_token_hashes
    hashes = np.empty((len(ends) - 1, NUM_HASHES), np.uint32)
    # The library returns lists of Python integers. Small chunks keep them in the CPU cache.
    for start in range(0, len(hashes), 256):
        chunk = ends[start : start + 257]
        hashes[start : start + 256] = digest(
            shingles[chunk[0] : chunk[-1]], np.ascontiguousarray(chunk - chunk[0]), NUM_HASHES, 1
        ).to_rows()
    return hashes


def _shingles(texts: list[str], seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return 64-bit hashes of the word 5-grams of each text, (S,) uint64, and their ends, (N + 1,) uint64.

    The ends start with 0. Equal 5-grams of texts with different seeds have different hashes. A text without words
    has no 5-grams.
    """
    text_words = [_WORD.findall(text.lower()) for text in texts]
    hashes = {word: zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in set().union(*text_words)}
    counts = np.array([len(words) for words in text_words], np.int64)
    lengths = np.where(counts, counts + _SHINGLE_WORDS - 1, 0)
    ends = np.append(0, np.cumsum(lengths))
    # There are four zeros between two texts, so each 5-gram covers words of one text and its padding.
    words = np.zeros(ends[-1] + _SHINGLE_WORDS - 1, np.uint64)
    inside = np.arange(counts.sum()) + np.repeat(
        ends[:-1] - np.append(0, np.cumsum(counts))[:-1] + _SHINGLE_WORDS - 1, counts
    )
    words[inside] = [hashes[word] for words in text_words for word in words]
    shingles = np.repeat(seeds, lengths) * _FACTORS[2, -1]
    for offset in range(_SHINGLE_WORDS):
        shingles += words[offset : offset + len(shingles)] * _FACTORS[2, offset]
    return shingles ^ shingles >> np.uint64(32), ends.astype(np.uint64)


def write_sketches(
    signatures_path: Path,
    bands_path: Path,
    signatures: np.ndarray,
    bands: np.ndarray,
    ordinals: np.ndarray,
    ranks: np.ndarray,
) -> None:
    """Write the sketches of one unit's records, each file atomically, for `resolve_near`.

    `signatures` (N, V, 128) and `bands` (N, bands, 2) come from `sketch`. `ordinals` (N,), ascending, and `ranks`
    (N,) are as in `duplicates.write_fingerprints`.
    """
    rows = np.empty(len(ordinals), _signature_dtype(signatures.shape[1]))
    rows["ordinal"], rows["signature"] = ordinals, signatures
    with atomic_path(signatures_path) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)
    count = bands.shape[1]
    write_fingerprints(
        bands_path, bands.reshape(-1, 2), np.repeat(np.arange(len(ordinals)), count), np.repeat(ranks, count)
    )


def _signature_dtype(views: int) -> np.dtype:
    return np.dtype([("ordinal", "<u8"), ("signature", "<u2", (views, NUM_HASHES))])


def resolve_near(
    signature_paths: list[Path],
    band_paths: list[Path],
    part: int,
    parts: int,
    out: Path,
    threshold: float = DEFAULT_THRESHOLD,
) -> None:
    """Write the near-duplicates in one part of the bands to `out`; `duplicates.dropped` reads the file.

    `signature_paths[unit]` and `band_paths[unit]` are the unit's files from `write_sketches`, made with the same
    threshold.
    """
    groups = equal_groups(band_paths, part, parts)
    sizes = _split_large_groups(groups.sizes)
    units, ordinals = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        start = int(ends[first] - sizes[first])
        last = max(first + 1, int(np.searchsorted(ends, start + LARGEST_GROUP, side="right")))
        members = slice(start, int(ends[last - 1]))
        # The "ordinals" in the band files are row numbers of a signature file, which has the ordinals of the records.
        rows = _read_signatures(signature_paths, groups.units[members], groups.ordinals[members])
        near = _is_near_earlier(rows["signature"], sizes[first:last], threshold)
        units.append(groups.units[members][near])
        ordinals.append(rows["ordinal"][near].astype(np.int64))
        first = last
    write_dropped(out, np.concatenate(units), np.concatenate(ordinals))


def _split_large_groups(sizes: np.ndarray) -> np.ndarray:
    """Return the group sizes, with groups above LARGEST_GROUP split into runs."""
    runs = -(-sizes // LARGEST_GROUP)
    cut = np.full(runs.sum(), LARGEST_GROUP, np.int64)
    cut[np.cumsum(runs) - 1] = sizes - (runs - 1) * LARGEST_GROUP
    return cut


def _read_signatures(paths: list[Path], units: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the signatures of N records, row `rows[i]` of the file `paths[units[i]]` each: (N,) `_signature_dtype`."""
    order = np.lexsort((rows, units))  # each file is read sequentially
    distinct_units, starts = np.unique(units[order], return_index=True)
    parts = []
    for unit, indices in zip(distinct_units.tolist(), np.split(order, starts[1:]), strict=True):
        parts.append(np.load(paths[unit], mmap_mode="r")[rows[indices]])
    signatures = np.concatenate(parts)
    return signatures[np.argsort(order)]


def _is_near_earlier(signatures: np.ndarray, sizes: np.ndarray, threshold: float) -> np.ndarray:
    """Return whether each record is near an earlier one of its group: (N, V, 128), (G,) -> (N,) bool."""
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    positions = np.arange(len(starts)) - starts
    near = np.zeros(len(starts), bool)
    # Records that have not been near any earlier one are compared with the first of their group, then the second, ...
    candidates = np.flatnonzero(positions > 0)
    leader = 0
    while len(candidates):
        same = signatures[candidates] == signatures[starts[candidates] + leader]
        hit = (same.mean(axis=2) >= threshold).all(axis=1)
        near[candidates[hit]] = True
        leader += 1
        candidates = candidates[~hit]
        candidates = candidates[positions[candidates] > leader]
    return near
