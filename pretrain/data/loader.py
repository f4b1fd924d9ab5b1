"""The stream of packed rows: order, loss dropout and packing, with a state of three integers.

Every rank plans the same rows from lengths alone, so it knows the counts of the whole global batch without
communication; it reads the tokens of its own rows only.
"""

from dataclasses import dataclass

import numpy as np

from pretrain.data.corpus import Corpus
from pretrain.data.layout import Layout
from pretrain.data.order import Order
from pretrain.data.packing import pack
from pretrain.data.ragged import mix


@dataclass(frozen=True)
class Rows:
    """`count` packed rows and the N records in them, sorted by row."""

    count: int
    records: np.ndarray
    """(N,) record numbers."""
    row: np.ndarray
    """(N,) the row of each, from 0."""
    start: np.ndarray
    """(N,) its first position in the row."""
    paired: np.ndarray
    """(N,) whether it takes part in the pair loss."""
    draws: np.ndarray
    """(N,) uint64: its random number in this epoch."""
    lengths: np.ndarray
    """(N, views) its tokens, by view among those that it has."""
    segment_lengths: np.ndarray
    """(N, segments) its positions, by segment of the layout."""

    def select(self, first: int, stop: int) -> "Rows":
        """Rows first to stop, numbered from 0."""
        low, high = np.searchsorted(self.row, [first, stop])
        part = slice(low, high)
        return Rows(stop - first, self.records[part], self.row[part] - first, self.start[part], self.paired[part],
                    self.draws[part], self.lengths[part], self.segment_lengths[part])

    @staticmethod
    def join(parts: list["Rows"], count: int) -> "Rows":
        """Rows one after another, then empty ones up to `count`."""
        first = np.cumsum([0] + [part.count for part in parts])
        return Rows(count, np.concatenate([part.records for part in parts]),
                    np.concatenate([part.row + offset for part, offset in zip(parts, first, strict=False)]),
                    *(np.concatenate([getattr(part, name) for part in parts])
                      for name in ("start", "paired", "draws", "lengths", "segment_lengths")))


def counts(rows: Rows, layout: Layout) -> dict[str, int]:
    """What the terms of a loss are normalised by, counted over the rows: next-token `targets`, `pairs`, and `spans`."""
    return {
        "targets": int(layout.lm_targets(rows.lengths, rows.segment_lengths).sum()),
        "pairs": int(layout.pairs(rows.segment_lengths, rows.paired).sum()),
        "spans": int(layout.span_counts(rows.segment_lengths).sum()),
    }


def draw(records: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A random number of each record and epoch, whatever came before it: (N,) -> (N,) uint64."""
    return mix(records.astype(np.uint64) ^ mix(np.uint64([seed]))[0] ^ mix(mix(np.uint64([epoch])))[0])


def plan_rows(corpus: Corpus, records: np.ndarray, layout: Layout, row_length: int, paired: np.ndarray, draws: np.ndarray) -> Rows:
    """Pack records (N,) with their pair flags (N,) and random numbers (N,) into as few rows as best-fit finds."""
    lengths = corpus.lengths(records)
    segment_lengths = layout.segment_lengths(lengths, paired)
    positions = segment_lengths.sum(axis=1)
    row = pack(positions, row_length)
    by_row = np.argsort(row, kind="stable")
    row, positions = row[by_row], positions[by_row]
    ends = np.cumsum(positions)
    row_begins = np.searchsorted(row, row)  # the first record of the same row
    start = ends - positions - (ends - positions)[row_begins]
    return Rows(int(row[-1]) + 1 if len(row) else 0, records[by_row], row, start, paired[by_row], draws[by_row], lengths[by_row],
                segment_lengths[by_row])


class Loader:
    """An endless or `epochs` long stream of rows, resumable anywhere.

    `dropout` is the share of records that take no part in the pair loss in an epoch, drawn by seed, epoch and record;
    the space of their extra segments goes to other records.
    """

    def __init__(self, corpus: Corpus, layout: Layout, row_length: int, seed: int, *, dropout: float = 0.0, epochs: int | None = None):
        self.corpus, self.layout, self.row_length = corpus, layout, row_length
        self.seed, self.dropout, self.epochs = seed, dropout, epochs
        self.order = Order(len(corpus), seed)
        self.epoch = self.window = self.row = 0
        self._planned: tuple[int, int] | None = None
        self._rows: Rows

    def state(self) -> dict[str, int]:
        """Where the stream stands; the same on every rank and for any number of them."""
        return {"epoch": self.epoch, "window": self.window, "row": self.row}

    def load_state(self, state: dict[str, int]) -> None:
        """Go on from a `state()`."""
        self.epoch, self.window, self.row = state["epoch"], state["window"], state["row"]

    @property
    def exhausted(self) -> bool:
        """Whether all epochs have been given out."""
        return self.epochs is not None and self.epoch >= self.epochs

    def next_rows(self, count: int) -> Rows:
        """The next `count` rows; at the end of the last epoch the missing ones are empty."""
        parts: list[Rows] = []
        missing = count
        while missing and not self.exhausted:
            rows = self._plan()
            take = min(missing, rows.count - self.row)
            parts.append(rows.select(self.row, self.row + take))
            missing -= take
            self.row += take
            if self.row == rows.count:
                self._next_window()
        if not parts:
            raise ValueError("the loader is exhausted")
        return Rows.join(parts, count)

    def _next_window(self) -> None:
        self.row = 0
        self.window += 1
        if self.window == self.order.windows:
            self.window = 0
            self.epoch += 1

    def _plan(self) -> Rows:
        if self._planned != (self.epoch, self.window):
            records = self.order.window(self.epoch, self.window)
            draws = draw(records, self.seed, self.epoch)
            paired = (draws >= np.uint64(self.dropout * 2**64)) & bool(self.layout.read_outs)
            rows = plan_rows(self.corpus, records, self.layout, self.row_length, paired, draws)
            self._rows = _shuffled(rows, np.random.default_rng([self.seed, self.epoch, self.window, 1]))
            self._planned = (self.epoch, self.window)
        return self._rows


def _shuffled(rows: Rows, rng: np.random.Generator) -> Rows:
    """Rows in random order: packing puts long records first, training should not."""
    place = rng.permutation(rows.count)
    by_row = np.argsort(place[rows.row], kind="stable")
    return Rows(rows.count, *(getattr(rows, name)[by_row] if name != "row" else place[rows.row][by_row]
                              for name in ("records", "row", "start", "paired", "draws", "lengths", "segment_lengths")))
