"""The order has each record once per pass, sources by weight, depends on seed and epoch only, and is cheap."""

import time
import tracemalloc
import zlib
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import BLOCK, WINDOW, Order, SourceOrder, _permute

SIZES = [
    1,
    2,
    BLOCK - 1,
    BLOCK,
    BLOCK + 1,
    5 * BLOCK + 7,
    WINDOW - 1,
    WINDOW,
    WINDOW + 1,
    2 * WINDOW,
    4 * WINDOW + 3 * BLOCK + 1,
]


def one_source(records: int, seed: int) -> Order:
    return Order([(0, records, 1.0)], seed)


def records_of_epoch(order: Order, epoch: int) -> np.ndarray:
    return np.concatenate([order.window(epoch, window)[0] for window in range(order.windows(epoch))])


@pytest.mark.parametrize("size", SIZES)
def test_an_epoch_holds_every_record_exactly_once(size):
    order = one_source(size, seed=5)
    for epoch in (0, 1, 1000):
        np.testing.assert_array_equal(np.sort(records_of_epoch(order, epoch)), np.arange(size))
        assert all((order.window(epoch, window)[1] == epoch).all() for window in range(order.windows(epoch)))


@pytest.mark.parametrize("size", [100, BLOCK + 1, WINDOW + 1, 4 * WINDOW])
def test_orders_differ_between_seeds_and_epochs_and_are_reproducible(size):
    orders = [records_of_epoch(one_source(size, seed), epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one != other).mean() > 0.9
    np.testing.assert_array_equal(orders[4], records_of_epoch(one_source(size, 1), 1))


def test_a_window_is_shuffled_and_reads_few_blocks():
    order = one_source(20 * WINDOW, seed=0)
    blocks = WINDOW // BLOCK
    for window in range(order.windows(0)):
        records, _ = order.window(0, window)
        assert len(records) == WINDOW and len(np.unique(records // BLOCK)) <= 2 * blocks
        assert len(np.flatnonzero(np.diff(np.sort(records)) > 1)) <= blocks, "complete blocks should be read"
        assert abs(np.corrcoef(records, np.arange(WINDOW))[0, 1]) < 0.02
    first_blocks = np.unique(order.window(0, 0)[0] // BLOCK)
    assert np.diff(first_blocks).max() > 2, "a window should be a sample of the corpus, not its beginning"


def test_the_remainder_after_the_full_blocks_differs_between_passes():
    size = 3 * BLOCK + 100
    order = SourceOrder(size, key=1)
    last = [set(order.take((number + 1) * size - 100, (number + 1) * size)[0].tolist()) for number in range(20)]
    assert len(set.union(*last)) > 800


@pytest.mark.parametrize("records", [10**9, 10**12])
def test_the_cost_of_a_window_does_not_grow_with_the_number_of_records(records):
    def three_windows(record_count: int) -> tuple[np.ndarray, float]:
        """Return the records of three windows, and the processor time in seconds."""
        begin = time.process_time()
        order = one_source(record_count, seed=1)
        windows = [order.window(3, window)[0] for window in (0, order.windows(3) // 2, order.windows(3) - 1)]
        return np.concatenate(windows), time.process_time() - begin

    timings = [(three_windows(4 * WINDOW)[1], three_windows(records)[1]) for _ in range(5)]
    seconds_few, seconds_many = map(min, zip(*timings, strict=True))
    assert seconds_many < 10 * seconds_few
    tracemalloc.start()
    window_records, _ = three_windows(records)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 8 * WINDOW
    assert len(np.unique(window_records)) == len(window_records)
    assert window_records.min() >= 0 and window_records.max() < records
    assert window_records.max() > records / 2 > window_records.min()


def test_an_order_needs_a_record():
    with pytest.raises(ValueError, match="at least one record"):
        one_source(0, seed=0)


@settings(deadline=None, max_examples=60)
@given(
    records=st.integers(1, 3 * BLOCK + 50), key=st.integers(0, 2**63), cuts=st.lists(st.integers(0, 10**4), max_size=6)
)
def test_parts_of_the_endless_order_join_to_the_full_order(records, key, cuts):
    order = SourceOrder(records, key)
    stop = 2 * records + records // 3
    full, passes = order.take(0, stop)
    np.testing.assert_array_equal(passes, np.arange(stop) // records)
    for number in (0, 1):
        np.testing.assert_array_equal(np.sort(full[passes == number]), np.arange(records))
    edges = [0, *sorted(min(cut, stop) for cut in cuts), stop]
    parts = [order.take(low, high)[0] for low, high in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), full)


WEIGHTS = st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 7.5])


@settings(deadline=None, max_examples=60)
@given(
    sources=st.lists(st.tuples(st.integers(1, 300), WEIGHTS), min_size=1, max_size=4),
    seed=st.integers(0, 100),
    epochs=st.integers(1, 7),
)
def test_a_mixture_repeats_records_by_the_weight_of_their_source(sources, seed, epochs):
    firsts = np.cumsum([0] + [records for records, _ in sources]).tolist()
    order = Order([(first, records, weight) for first, (records, weight) in zip(firsts, sources, strict=False)], seed)
    count = Counter(record for epoch in range(epochs) for record in records_of_epoch(order, epoch).tolist())
    assert sum(count.values()) == order.records_in_epochs(epochs)
    for first, (records, weight) in zip(firsts, sources, strict=False):
        repetitions = [count[record] for record in range(first, first + records)]
        assert max(repetitions) - min(repetitions) <= 1
        assert sum(repetitions) == epochs * Fraction(str(weight)) * records // 1


def test_each_window_holds_every_source_in_proportion():
    sizes, weights = (3 * WINDOW, 5000, 40_000), (1.0, 4.0, 0.5)
    firsts = (0, sizes[0], sizes[0] + sizes[1])
    order = Order(list(zip(firsts, sizes, weights, strict=True)), seed=3)
    assert order.epoch_records == sum(size * weight for size, weight in zip(sizes, weights, strict=True))
    for epoch in (0, 1):
        for window in range(order.windows(epoch)):
            records, _ = order.window(epoch, window)
            assert len(records) <= WINDOW + len(sizes)
            source_counts = np.bincount(np.searchsorted(firsts, records, side="right") - 1)
            expected = [size * weight / order.windows(epoch) for size, weight in zip(sizes, weights, strict=True)]
            assert np.abs(source_counts - expected).max() <= 1
            third = np.searchsorted(firsts, records[: len(records) // 3], side="right") - 1
            assert np.abs(np.bincount(third) - source_counts / 3).max() < 500, (
                "the sources should be mixed within the window"
            )


def test_repetitions_within_an_epoch_belong_to_different_passes():
    order = Order([(0, 100, 2.0)], seed=0)
    records, passes = order.window(0, 0)
    assert sorted(zip(records.tolist(), passes.tolist(), strict=True)) == [
        (record, number) for record in range(100) for number in (0, 1)
    ]


def checksum(*columns: np.ndarray) -> int:
    return zlib.crc32(b"".join(column.astype("<i8").tobytes() for column in columns))


def test_the_order_of_a_seed_stays_the_same_in_every_version_of_the_project():
    """A checkpoint holds only a position in this order, and runs may resume after an update of the project."""
    records, passes = Order([(0, 3 * BLOCK + 100, 1.5), (3 * BLOCK + 100, 50, 2.0)], seed=7).window(1, 0)
    assert (len(records), records[:4].tolist(), passes[:4].tolist()) == (4858, [3018, 487, 3176, 275], [2, 2, 3, 2])
    assert checksum(records, passes) == 2706452172
    records, passes = Order([(0, 2 * WINDOW + 10, 1.0)], seed=3).window(2, 1)
    assert (len(records), records[:4].tolist(), checksum(records, passes)) == (
        43694,
        [27410, 70207, 9315, 109646],
        4134076059,
    )
    records, passes = SourceOrder(10**12, key=5).take(10**13, 10**13 + 3 * BLOCK)
    assert (records[::BLOCK].tolist(), checksum(records, passes)) == (
        [242028733582, 652013053070, 116415284366],
        4180071543,
    )


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 9, 17, 18])
def test_each_record_occurs_once_per_pass_for_any_number_of_blocks(blocks):
    records, passes = SourceOrder(blocks * BLOCK + 3, 7).take(0, blocks * BLOCK + 3)
    assert np.array_equal(np.sort(records), np.arange(blocks * BLOCK + 3)) and not passes.any()


@pytest.mark.parametrize("blocks", [5, 17, 65])
def test_the_last_block_changes_its_position(blocks):
    """The block counts are powers of four plus one. With one bit too few, the last block would never move."""
    positions = {
        int(np.flatnonzero(_permute(np.arange(blocks), blocks, np.full(blocks, key, np.uint64)) == blocks - 1)[0])
        for key in range(50)
    }
    assert len(positions) > 3


def test_a_window_from_any_start_is_part_of_the_full_order():
    size = 3 * BLOCK + 5
    order = SourceOrder(size, 7)
    full_order = order.take(0, 2 * size)
    for start in (0, 1, BLOCK, BLOCK + 3, 2 * BLOCK, 3 * BLOCK + 1, size - 1, size, size + BLOCK + 1):
        for part, full in zip(order.take(start, start + BLOCK), full_order, strict=True):
            assert np.array_equal(part, full[start : start + BLOCK]), start
