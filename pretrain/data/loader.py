"""The stream of packed rows: order, loss dropout and packing, with a state of three integers.

Every rank computes the same packing from the record lengths alone. It therefore knows the counts of the whole
global batch without communication, and reads only the tokens of its own rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.layout import Layout
from data_prep.utils.console import UserError
from data_prep.utils.ragged import splitmix64
from pretrain.data.corpus import Corpus, source_weights
from pretrain.data.order import Order
from pretrain.data.packing import pack


@dataclass(frozen=True)
class Rows:
    """`count` packed rows and the N records in them, sorted by row."""

    count: int
    records: np.ndarray
    """(N,) record numbers."""
    row: np.ndarray
    """(N,) row of each record, from 0."""
    start: np.ndarray
    """(N,) first position of each record in its row."""
    paired: np.ndarray
    """(N,) whether each record is included in the pair loss."""
    random_bits: np.ndarray
    """(N,) uint64 random number of each record in this pass over its source."""
    lengths: np.ndarray
    """(N, views) tokens of each view, numbered among the views that the record has."""
    segment_lengths: np.ndarray
    """(N, segments) positions of each segment of the layout."""

    def select(self, first: int, stop: int) -> "Rows":
        """Return the rows from `first` up to but not including `stop`, renumbered from 0."""
        low, high = np.searchsorted(self.row, [first, stop])
        part = slice(low, high)
        return Rows(
            stop - first,
            self.records[part],
            self.row[part] - first,
            self.start[part],
            self.paired[part],
            self.random_bits[part],
            self.lengths[part],
            self.segment_lengths[part],
        )

    @staticmethod
    def join(parts: list["Rows"], count: int) -> "Rows":
        """Return the rows of all parts in order, followed by empty rows up to `count`."""
        first = np.cumsum([0] + [part.count for part in parts])
        return Rows(
            count,
            np.concatenate([part.records for part in parts]),
            np.concatenate([part.row + offset for part, offset in zip(parts, first, strict=False)]),
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("start", "paired", "random_bits", "lengths", "segment_lengths")
            ),
        )


Unit = Callable[[Rows, Layout], int]
"""A unit over which a loss term is summed, as the function that counts it in rows."""


def count_targets(rows: Rows, layout: Layout) -> int:
    """Return the number of next-token targets of the rows."""
    return int(layout.count_lm_targets(rows.lengths, rows.segment_lengths).sum())


def count_pairs(rows: Rows, layout: Layout) -> int:
    """Return the number of pairs of a prediction and a target embedding."""
    return int(layout.pairs(rows.segment_lengths, rows.paired).sum())


def count_spans(rows: Rows, layout: Layout) -> int:
    """Return the number of spans, see pretrain/data/spans.py."""
    return int(layout.count_spans(rows.segment_lengths).sum())


def count_ends(rows: Rows, layout: Layout) -> int:
    """Return the number of view ends that are read out."""
    return int(layout.view_ends(rows.segment_lengths).sum())


def loss_denominators(rows: Rows, layout: Layout, units: Mapping[str, Unit]) -> dict[str, int]:
    """Return the count that normalises each loss term over the rows. `units` has the unit of each term."""
    return {term: count(rows, layout) for term, count in units.items()}


def draw_random_bits(records: np.ndarray, seed: int, passes: np.ndarray) -> np.ndarray:
    """Return a random number for each record and pass over its source: (N,), (N,) -> (N,) uint64.

    It depends only on the record, the pass and the seed.
    """
    return splitmix64(
        records.astype(np.uint64) ^ splitmix64(np.array([seed], np.uint64)) ^ splitmix64(splitmix64(passes))
    )


def plan_rows(
    corpus: Corpus, records: np.ndarray, layout: Layout, row_length: int, paired: np.ndarray, random_bits: np.ndarray
) -> Rows:
    """Pack records (N,) with their pair flags (N,) and random numbers (N,) into rows by best fit."""
    lengths = corpus.lengths(records)
    segment_lengths = layout.segment_lengths(lengths, paired)
    positions = segment_lengths.sum(axis=1)
    row = pack(positions, row_length)
    by_row = np.argsort(row, kind="stable")
    row, positions = row[by_row], positions[by_row]
    ends = np.cumsum(positions)
    row_begins = np.searchsorted(row, row)  # the first record of the same row
    start = ends - positions - (ends - positions)[row_begins]
    return Rows(
        int(row[-1]) + 1 if len(row) else 0,
        records[by_row],
        row,
        start,
        paired[by_row],
        random_bits[by_row],
        lengths[by_row],
        segment_lengths[by_row],
    )


class Loader:
    """A stream of rows that is endless or `epochs` long and can be resumed at any row.

    `weights` lists the number of occurrences per epoch of the records of each source; default: as in the manifest.
    `dropout` is the fraction of records that are excluded from the pair loss in a pass over their source. They are
    drawn from seed, pass and record, and the space of their pair segments is used by other records. Raises UserError if
    the epochs contain no records.
    """

    def __init__(
        self,
        corpus: Corpus,
        layout: Layout,
        row_length: int,
        seed: int,
        *,
        weights: Sequence[float] | None = None,
        dropout: float = 0.0,
        epochs: int | None = None,
    ):
        self.corpus, self.layout, self.row_length = corpus, layout, row_length
        self.seed, self.dropout, self.epochs = seed, dropout, epochs
        weights = source_weights(corpus.manifest) if weights is None else weights
        self.order = Order([(source.first, source.records, weights[source.number]) for source in corpus.sources], seed)
        if self.order.records_in_epochs(epochs or 1000) == 0:
            raise UserError(
                f"{f'{epochs} epochs' if epochs else 'a thousand epochs'} of {corpus.folder} contain no records: "
                "raise data.sources.N.weight of its sources"
            )
        self.epoch = self.window = self.row = 0
        self._planned: tuple[int, int] | None = None
        self._rows: Rows

    @property
    def records(self) -> int:
        """Number of records in all epochs; 0 if the stream is endless."""
        return self.order.records_in_epochs(self.epochs) if self.epochs else 0

    def state(self) -> dict[str, int]:
        """Return the position in the stream; it is the same on every rank and for any number of ranks."""
        return {"epoch": self.epoch, "window": self.window, "row": self.row}

    def load_state(self, state: dict[str, int]) -> None:
        """Continue from a `state()`."""
        self.epoch, self.window, self.row = state["epoch"], state["window"], state["row"]

    @property
    def exhausted(self) -> bool:
        """Whether all epochs have been returned."""
        return self.epochs is not None and self.epoch >= self.epochs

    def next_rows(self, count: int) -> Rows:
        """Return the next `count` rows; at the end of the last epoch the missing rows are empty.

        Raises ValueError if the loader is exhausted, or if its state does not exist.
        """
        parts: list[Rows] = []
        missing = count
        while missing and not self.exhausted:
            rows = self._plan()
            if self.row and self.row >= rows.count:
                raise ValueError(
                    f"the state of the loader is row {self.row} of a window of {rows.count} rows: it was saved by a "
                    "version with a different packing"
                )
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
        if self.window == self.order.windows(self.epoch):
            self.window = 0
            self.epoch += 1

    def _plan(self) -> Rows:
        if self._planned != (self.epoch, self.window):
            records, passes = self.order.window(self.epoch, self.window)
            random_bits = draw_random_bits(records, self.seed, passes)
            paired = (random_bits >= np.uint64(self.dropout * 2**64)) & bool(self.layout.read_outs)
            rows = plan_rows(self.corpus, records, self.layout, self.row_length, paired, random_bits)
            self._rows = _shuffled(rows, np.random.default_rng([self.seed, self.epoch, self.window, 1]))
            self._planned = (self.epoch, self.window)
        return self._rows


def _shuffled(rows: Rows, rng: np.random.Generator) -> Rows:
    """Return the rows in random order, because packing puts long records first and training should not."""
    place = rng.permutation(rows.count)
    by_row = np.argsort(place[rows.row], kind="stable")
    return Rows(
        rows.count,
        *(
            getattr(rows, name)[by_row] if name != "row" else place[rows.row][by_row]
            for name in ("records", "row", "start", "paired", "random_bits", "lengths", "segment_lengths")
        ),
    )
