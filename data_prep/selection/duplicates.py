"""Exact duplicates across a whole corpus in bounded memory: fingerprints are kept on disk.

Every unit of work writes the sorted fingerprints of its records once (`write_fingerprints`). The space of
fingerprints is then divided into parts of about four million records. Any process can resolve any part, in any
order (`resolve`). It reads the part's range of every unit's file through a memory map. The dropped records do not
depend on the number of parts.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.utils.files import atomic_path

SPLIT_PRIORITY = ("test", "validation", "train")
"""Splits in order of preference: of equal records, the one in the earliest split is kept. A training record that
equals a test record is therefore dropped."""
ROWS_PER_PART = 4_000_000
"""Fingerprints resolved at a time; they take about 500 MB of memory."""
_RANK_BITS = np.uint64(62)


class EqualGroups(NamedTuple):
    """Rows of equal fingerprints, by fingerprint and then by preference; groups of one row are excluded."""

    units: np.ndarray
    """Unit of each row, (N,) int64."""
    ordinals: np.ndarray
    """Ordinal of each row within its unit, (N,) int64."""
    sizes: np.ndarray
    """Rows of each group, (G,) int64; the sum is N."""


def fingerprints(records: list[tuple[str, ...]]) -> np.ndarray:
    """Return 128 bits of BLAKE2b over all views of each record and their boundaries: (N, 2) uint64."""
    return np.frombuffer(b"".join(map(_digest, records)), "<u8").reshape(-1, 2)


def _digest(views: tuple[str, ...]) -> bytes:
    text = ",".join([str(len(view)) for view in views]) + ";" + "".join(views)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def write_fingerprints(path: Path, fingerprints: np.ndarray, ordinals: np.ndarray, ranks: np.ndarray) -> None:
    """Write one unit's fingerprints, sorted, atomically: a plain .npy of (3, N) uint64, read by `resolve`.

    `fingerprints` is (N, 2) uint64. `ordinals` (N,) are the indices of the records within the unit, below 2^62.
    `ranks` (N,) are the indices of their splits in SPLIT_PRIORITY. The rows of the file are the two halves of the
    fingerprint, and one number that combines rank and ordinal.
    """
    order = ranks.astype(np.uint64) << _RANK_BITS | ordinals.astype(np.uint64)
    rows = np.stack([fingerprints[:, 0], fingerprints[:, 1], order])
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, rows[:, np.lexsort(rows[::-1])])


def num_parts(rows: int) -> int:
    """Return the number of parts for a number of fingerprints: at least one."""
    return max(1, -(-rows // ROWS_PER_PART))


def resolve(paths: list[Path], part: int, parts: int, out: Path) -> None:
    """Write the duplicates of one part: all but the first record of each group, by (split, unit, ordinal).

    `paths[unit]` is the unit's file from `write_fingerprints`. `out` is written atomically, and `dropped` reads it.
    """
    groups = equal_groups(paths, part, parts)
    is_duplicate = np.ones(len(groups.units), bool)
    is_duplicate[np.cumsum(groups.sizes) - groups.sizes] = False
    write_dropped(out, groups.units[is_duplicate], groups.ordinals[is_duplicate])


def equal_groups(paths: list[Path], part: int, parts: int) -> EqualGroups:
    """Return the groups of equal fingerprints in one part of all units' files.

    The first row of each group is the first by (split, unit, ordinal).
    """
    stretches, counts = [], []
    for path in paths:
        rows = np.load(path, mmap_mode="r")
        # The bounds are exact integers, so each fingerprint is in exactly one part for any number of parts.
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
    repeated = by_high[np.append(same, False) | np.append(False, same)] if len(by_high) else by_high
    high, low, order, units = high[repeated], low[repeated], order[repeated], units[repeated]
    # The sort is stable: equal keys stay ordered by unit, and then by ordinal.
    by_fingerprint = np.lexsort((order >> _RANK_BITS, low, high))
    high, low, order, units = high[by_fingerprint], low[by_fingerprint], order[by_fingerprint], units[by_fingerprint]
    first = np.ones(len(high), bool)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    sizes = np.diff(np.append(np.flatnonzero(first), len(high)))
    in_group = np.repeat(sizes > 1, sizes)
    ordinals = (order & ((np.uint64(1) << _RANK_BITS) - np.uint64(1))).astype(np.int64)
    return EqualGroups(units[in_group], ordinals[in_group], sizes[sizes > 1])


def write_dropped(out: Path, units: np.ndarray, ordinals: np.ndarray) -> None:
    """Write the records to drop, sorted by (unit, ordinal), atomically: a plain .npy of (2, N) int64."""
    rows = np.stack([units, ordinals]).astype(np.int64)[:, np.lexsort((ordinals, units))]
    with atomic_path(out) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)


def dropped(outs: list[Path], unit: int) -> np.ndarray:
    """Return the ordinals of one unit's records to drop, sorted and unique: (M,) int64.

    `outs` are the files of all parts.
    """
    parts = [np.empty(0, np.int64)]
    for out in outs:
        units, ordinals = np.load(out, mmap_mode="r")
        start, stop = np.searchsorted(units, [unit, unit + 1])
        parts.append(np.array(ordinals[start:stop]))
    return np.unique(np.concatenate(parts))
