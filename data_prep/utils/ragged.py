"""NumPy operations on ragged arrays: runs of unequal length, stored one after the other."""

import itertools
from collections.abc import Sequence

import numpy as np


def flatten(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate lists of token ids: N lists -> ids (sum of lengths,) uint32, lengths (N,)."""
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return np.fromiter(itertools.chain.from_iterable(lists), np.uint32, int(lengths.sum())), lengths


def ragged_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate `arange(start, start + length)` over all runs: (N,), (N,) -> (sum of lengths,)."""
    ends = np.cumsum(lengths)
    out = np.repeat(starts - (ends - lengths), lengths)
    out += np.arange(len(out))
    return out


def ragged_sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the sum of each run of `values`, in their type: (sum of lengths,), (N,) -> (N,)."""
    totals = np.zeros(len(values) + 1, values.dtype)
    np.cumsum(values, dtype=values.dtype, out=totals[1:])
    ends = np.cumsum(lengths)
    sums: np.ndarray = totals[ends] - totals[ends - lengths]
    return sums


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Return the SplitMix64 hash of unsigned 64-bit integers (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64)
        z += np.uint64(0x9E3779B97F4A7C15)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        return z
