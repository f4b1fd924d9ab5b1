"""The order of the records: a pure function of seed and epoch that does not depend on the number of ranks.

Each source has its own endless order. A pass over a source permutes blocks of consecutive records by a keyed bijection,
which is evaluated on demand and never stored. Each pass numbers the records from a new random offset, so the remainder
after the last full block differs between passes. An epoch of a mixture takes `weight` passes of each source. Each of
its windows contains every source in proportion and is shuffled. Memory is bounded by a window, reads are nearly
sequential, and any position is reached in constant time.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data_prep.utils.ragged import splitmix64

BLOCK = 1024
WINDOW = 64 * BLOCK
ROUNDS = 6


class SourceOrder:
    """The endless order of one source of `records` records; each record occurs once in every pass."""

    def __init__(self, records: int, key: int):
        if records <= 0:
            raise ValueError("an order needs at least one record")
        self.records = records
        self.blocks = records // BLOCK
        self._key = splitmix64(np.array([key], np.uint64))

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the records at positions `start` up to `stop` of the order, and the pass of each, both (M,)."""
        passes, place = np.divmod(np.arange(start, stop), self.records)
        block = place // BLOCK
        # starts of the runs of positions that are in the same block of the same pass
        begins = np.flatnonzero(np.diff(passes * (self.blocks + 1) + block, prepend=-1))
        key = splitmix64(self._key + splitmix64(passes[begins]))
        moved, whole = block[begins], block[begins] < self.blocks
        moved[whole] = _permute(moved[whole], self.blocks, key[whole])
        first = moved * BLOCK + (splitmix64(key) % np.uint64(self.records)).astype(np.int64)
        lengths = np.diff(begins, append=len(place))
        return (np.repeat(first, lengths) + place % BLOCK) % self.records, passes


def _permute(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Permute `places` below `size` by a bijection that depends on the key of each.

    The bijection is a Feistel network on the next power of two with an even exponent. It is applied repeatedly until
    the result is below `size` (cycle walking).
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    mask = np.uint64((1 << half) - 1)
    out = places.astype(np.uint64)
    outside = np.arange(len(out))
    while len(outside):
        left, right, key = out[outside] >> np.uint64(half), out[outside] & mask, keys[outside]
        for turn in range(ROUNDS):
            left, right = right, left ^ (splitmix64(right ^ splitmix64(key + np.uint64(turn))) & mask)
        out[outside] = (left << np.uint64(half)) | right
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


class Order:
    """The order of a mixture of sources in each epoch, window by window.

    A source is (first record, records, weight), and each of its records occurs `weight` times in an epoch on average.
    Epoch e starts at position floor(e * weight * records) of the source's endless order. After any number of epochs,
    the counts of any two records of a source differ by at most one.
    """

    def __init__(self, sources: Sequence[tuple[int, int, float]], seed: int):
        self.seed = seed
        self._first = [first for first, _, _ in sources]
        self._orders = [SourceOrder(records, hash_of(seed, number)) for number, (_, records, _) in enumerate(sources)]
        self._shares = [Fraction(str(weight)) * records for _, records, weight in sources]

    @property
    def epoch_records(self) -> float:
        """Mean number of records in an epoch."""
        return float(sum(self._shares))

    def records_in_epochs(self, epochs: int) -> int:
        """Return the number of records in the first `epochs` epochs."""
        return sum(int(epochs * share) for share in self._shares)

    def windows(self, epoch: int) -> int:
        """Return the number of windows in an epoch.

        A window has at most WINDOW records, plus one per source from rounding.
        """
        return max(1, -(-(self.records_in_epochs(epoch + 1) - self.records_in_epochs(epoch)) // WINDOW))

    def window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the records of one window of an epoch, and the pass over its source for each, both (M,)."""
        windows = self.windows(epoch)
        taken = []
        for first, order, share in zip(self._first, self._orders, self._shares, strict=True):
            begin, end = int(epoch * share), int((epoch + 1) * share)
            start, stop = (begin + (end - begin) * part // windows for part in (window, window + 1))
            records, passes = order.take(start, stop)
            taken.append((records + first, passes))
        records, passes = (np.concatenate(column) for column in zip(*taken, strict=True))
        shuffled = np.random.default_rng([self.seed, epoch, window]).permutation(len(records))
        return records[shuffled], passes[shuffled]


def hash_of(seed: int, number: int) -> int:
    """Return the key of source `number`."""
    seeds, numbers = np.array([seed], np.uint64), np.array([number], np.uint64)
    return int((splitmix64(seeds) + splitmix64(splitmix64(numbers)))[0])
