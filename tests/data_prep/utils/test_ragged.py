"""The array helpers return the same results as the loops that they replace."""

import numpy as np
import pytest

from data_prep.utils.ragged import flatten, ragged_ranges, ragged_sums, splitmix64

RUNS = [
    [],
    [0],
    [3],
    [0, 0],
    [2, 0, 5, 1, 0],
    [0, 4],
    *(np.random.default_rng(seed).integers(0, 9, 40).tolist() for seed in range(3)),
]


@pytest.mark.parametrize("lengths", RUNS)
def test_flatten_concatenates_lists_and_counts_their_elements(lengths):
    lists = [np.random.default_rng(length).integers(0, 2**32, length).tolist() for length in lengths]
    values, counts = flatten(lists)
    assert values.tolist() == [value for one in lists for value in one] and values.dtype == np.uint32
    assert counts.tolist() == lengths and counts.dtype == np.int64


@pytest.mark.parametrize("lengths", RUNS)
def test_ragged_ranges_concatenates_every_run(lengths):
    starts = np.random.default_rng(len(lengths)).integers(0, 1000, len(lengths))
    expected = [value for start, length in zip(starts, lengths, strict=True) for value in range(start, start + length)]
    assert ragged_ranges(starts, np.array(lengths, np.int64)).tolist() == expected


@pytest.mark.parametrize("lengths", RUNS)
@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_ragged_sums_adds_up_every_run_and_wraps_around(lengths, dtype):
    values = np.random.default_rng(1).integers(0, 2**63, sum(lengths), np.int64).astype(dtype)
    ends = np.cumsum(np.array(lengths, np.int64))
    expected = [sum(map(int, values[end - length : end])) % 2**64 for end, length in zip(ends, lengths, strict=True)]
    sums = ragged_sums(values, np.array(lengths, np.int64))
    assert sums.dtype == dtype
    assert [int(total) % 2**64 for total in sums] == expected


def test_splitmix64_matches_the_published_generator():
    """Expect the first outputs of the published generator from seed 1234567."""
    state = [(1234567 + step * 0x9E3779B97F4A7C15) % 2**64 for step in range(3)]
    assert splitmix64(np.array(state, np.uint64)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_splitmix64_changes_every_bit_between_neighbours():
    changed = splitmix64(np.arange(4096, dtype=np.uint64)) ^ splitmix64(np.arange(1, 4097, dtype=np.uint64))
    flips = [float((changed >> np.uint64(bit) & np.uint64(1)).mean()) for bit in range(64)]
    assert min(flips) > 0.45 and max(flips) < 0.55
