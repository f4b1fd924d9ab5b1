"""The order: a permutation of the records, a pure function of seed and epoch, as cheap for a billion as for one."""

import time
import tracemalloc

import numpy as np
import pytest

from pretrain.data.order import BLOCK, WINDOW_BLOCKS, Order

WINDOW = BLOCK * WINDOW_BLOCKS
SIZES = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 4 * WINDOW + 3 * BLOCK + 1]


def whole_epoch(order: Order, epoch: int) -> np.ndarray:
    return np.concatenate([order.window(epoch, window) for window in range(order.windows)])


@pytest.mark.parametrize("size", SIZES)
def test_an_epoch_holds_every_record_exactly_once(size):
    order = Order(size, seed=5)
    for epoch in (0, 1, 1000):
        np.testing.assert_array_equal(np.sort(whole_epoch(order, epoch)), np.arange(size))


@pytest.mark.parametrize("size", [100, BLOCK + 1, WINDOW + 1, 4 * WINDOW])
def test_seeds_and_epochs_differ_and_repeat(size):
    orders = [whole_epoch(Order(size, seed), epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one != other).mean() > 0.9
    np.testing.assert_array_equal(orders[4], whole_epoch(Order(size, 1), 1))


def test_a_window_is_shuffled_and_reads_few_blocks():
    order = Order(20 * WINDOW, seed=0)
    for window in range(order.windows):
        records = order.window(0, window)
        assert len(records) == WINDOW and len(np.unique(records // BLOCK)) == WINDOW_BLOCKS
        assert abs(np.corrcoef(records, np.arange(WINDOW))[0, 1]) < 0.02
    first_blocks = np.unique(order.window(0, 0) // BLOCK)
    assert np.diff(first_blocks).max() > 1, "a window is a sample of the corpus, not its beginning"


def test_a_billion_records_cost_one_window():
    records = 10**9
    order = Order(records, seed=1)
    order.window(0, 0)
    tracemalloc.start()
    begin = time.perf_counter()
    windows = [order.window(3, window) for window in (0, order.windows // 2, order.windows - 1)]
    seconds = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1 and peak < 20 * 8 * WINDOW
    together = np.concatenate(windows)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0 and together.max() < records
    assert together.max() > records / 2 > together.min()


def test_no_records_have_no_order():
    with pytest.raises(ValueError, match="at least one record"):
        Order(0, seed=0)
