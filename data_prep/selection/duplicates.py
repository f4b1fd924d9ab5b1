"""Exact duplicates across a whole corpus, in bounded memory: what is not read spills to disk.

Every unit of work writes the fingerprints of its records once, sorted (`write_fingerprints`). The space of fingerprints is then cut
into parts of some four million records, which are resolved one by one, by any process in any order (`resolve`): each reads its stretch
of every unit's file through a memory map. What is dropped does not depend on the number of parts.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.files import atomic_path

SPLIT_PRIORITY = ("test", "validation", "train")
"""Of equal records the one in the earlier split stays: a training record that equals a test record is the one to drop."""
ROWS_PER_PART = 4_000_000
"""Fingerprints resolved at a time; some 500 MB of memory."""
_RANK_BITS = np.uint64(62)


class EqualGroups(NamedTuple):
    """Rows of equal fingerprints, in the order of the fingerprints and then of preference; groups of one are left out."""

    units: np.ndarray
    """(N,) int64."""
    ordinals: np.ndarray
    """(N,) int64, within the unit."""
    sizes: np.ndarray
    """(G,) int64 rows of each group; they sum up to N."""


def fingerprints(records: list[tuple[str, ...]]) -> np.ndarray:
    """128 bits of BLAKE2b over all views of each record, and the borders between them: (N, 2) uint64."""
    return np.frombuffer(b"".join(map(_digest, records)), "<u8").reshape(-1, 2)


def _digest(views: tuple[str, ...]) -> bytes:
    text = ",".join([str(len(view)) for view in views]) + ";" + "".join(views)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def write_fingerprints(path: Path, fingerprints: np.ndarray, ordinals: np.ndarray, ranks: np.ndarray) -> None:
    """Write one unit's fingerprints, sorted, in one atomic step: a plain .npy of (3, N) uint64, read by `resolve`.

    `fingerprints` is (N, 2) uint64, `ordinals` (N,) the records' places within the unit, below 2^62, and `ranks` (N,) the places of their
    splits in SPLIT_PRIORITY. The rows of the file are the fingerprints' halves, and rank and ordinal in one number.
    """
    order = ranks.astype(np.uint64) << _RANK_BITS | ordinals.astype(np.uint64)
    rows = np.stack([fingerprints[:, 0], fingerprints[:, 1], order])
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, rows[:, np.lexsort(rows[::-1])])


def num_parts(rows: int) -> int:
    """Into how many parts the fingerprints are cut for so many rows: at least one."""
    return max(1, -(-rows // ROWS_PER_PART))


def resolve(paths: list[Path], part: int, parts: int, out: Path) -> None:
    """Write which records of one part of the fingerprints are dropped: of equal ones all but the first by (split, unit, ordinal).

    `paths[unit]` is the unit's file from `write_fingerprints`; `out` is written in one atomic step and read by `dropped`.
    """
    found = equal_groups(paths, part, parts)
    later = np.ones(len(found.units), bool)
    later[np.cumsum(found.sizes) - found.sizes] = False
    write_dropped(out, found.units[later], found.ordinals[later])


def equal_groups(paths: list[Path], part: int, parts: int) -> EqualGroups:
    """The groups of equal fingerprints among one part of all units' files, the first of each group by (split, unit, ordinal) in front."""
    stretches, counts = [], []
    for path in paths:
        rows = np.load(path, mmap_mode="r")
        # The bounds are exact integers: a fingerprint falls into one part, whatever the number of parts.
        start, stop = (
            len(rows[0]) if bound >> 64 else int(np.searchsorted(rows[0], np.uint64(bound)))
            for bound in (part * 2**64 // parts, (part + 1) * 2**64 // parts)
        )
        stretches.append(np.array(rows[:, start:stop]))
        counts.append(stop - start)
    high, low, order = np.concatenate(stretches, axis=1) if stretches else np.empty((3, 0), np.uint64)
    del stretches
    units = np.repeat(np.arange(len(paths)), counts)

    by_high = np.argsort(high, kind="stable")  # merges the units' sorted stretches
    same = high[by_high[1:]] == high[by_high[:-1]]
    shared = by_high[np.append(same, False) | np.append(False, same)] if len(by_high) else by_high
    high, low, order, units = high[shared], low[shared], order[shared], units[shared]
    # Equal keys keep their order, which is that of the units, and within a unit that of the ordinals.
    sort = np.lexsort((order >> _RANK_BITS, low, high))
    high, low, order, units = high[sort], low[sort], order[sort], units[sort]
    first = np.ones(len(high), bool)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    sizes = np.diff(np.append(np.flatnonzero(first), len(high)))
    several = np.repeat(sizes > 1, sizes)
    ordinals = (order & ((np.uint64(1) << _RANK_BITS) - np.uint64(1))).astype(np.int64)
    return EqualGroups(units[several], ordinals[several], sizes[sizes > 1])


def write_dropped(out: Path, units: np.ndarray, ordinals: np.ndarray) -> None:
    """Write the records to drop, sorted by (unit, ordinal), in one atomic step: a plain .npy of (2, N) int64."""
    rows = np.stack([units, ordinals]).astype(np.int64)[:, np.lexsort((ordinals, units))]
    with atomic_path(out) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)


def dropped(outs: list[Path], unit: int) -> np.ndarray:
    """The ordinals of one unit to drop, sorted, each once: (M,) int64. `outs` are the files of all parts."""
    found = [np.empty(0, np.int64)]
    for out in outs:
        units, ordinals = np.load(out, mmap_mode="r")
        start, stop = np.searchsorted(units, [unit, unit + 1])
        found.append(np.array(ordinals[start:stop]))
    return np.unique(np.concatenate(found))
