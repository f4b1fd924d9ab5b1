"""Which record comes when: a pure function of seed and epoch, whatever the number of ranks.

Records are read in blocks of consecutive ones. The blocks are permuted by a keyed bijection that is evaluated
where needed, never stored; the records of a window of blocks are then shuffled together. Memory is bounded by a
window, reads are near-sequential, and any position of the order is reached at once.
"""

import numpy as np

from pretrain.data.ragged import mix

BLOCK = 1024
WINDOW_BLOCKS = 64
ROUNDS = 6


class Order:
    """The order of `records` records in each epoch, given window by window."""

    def __init__(self, records: int, seed: int):
        if records <= 0:
            raise ValueError("an order needs at least one record")
        self.records, self.seed = records, seed
        self.blocks = -(-records // BLOCK)
        self.windows = -(-self.blocks // WINDOW_BLOCKS)

    def window(self, epoch: int, window: int) -> np.ndarray:
        """The record numbers of one window of an epoch, (M,), M at most BLOCK * WINDOW_BLOCKS.

        The windows 0 to `windows` of an epoch hold every record exactly once.
        """
        places = np.arange(window * WINDOW_BLOCKS, min((window + 1) * WINDOW_BLOCKS, self.blocks))
        blocks = self._permute(places, epoch)
        records = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        records = records[records < self.records]
        return np.random.default_rng([self.seed, epoch, window]).permutation(records)

    def _permute(self, places: np.ndarray, epoch: int) -> np.ndarray:
        """A bijection of the block numbers: a Feistel network on the next even power of two, walked until in range."""
        half = max(1, -(-(self.blocks - 1).bit_length() // 2))
        mask = np.uint64((1 << half) - 1)
        keys = mix(np.arange(ROUNDS, dtype=np.uint64) + mix(np.uint64([self.seed]))[0] + mix(mix(np.uint64([epoch])))[0])
        out = places.astype(np.uint64)
        outside = np.ones(len(out), bool)
        while outside.any():
            left, right = out[outside] >> np.uint64(half), out[outside] & mask
            for key in keys:
                left, right = right, left ^ (mix(right ^ key) & mask)
            out[outside] = (left << np.uint64(half)) | right
            outside = out >= self.blocks
        return out.astype(np.int64)
