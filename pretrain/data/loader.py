"""The stream of packed rows: order, loss dropout and packing, with a state of a few numbers.

Every rank computes the same packing from the record lengths alone. It therefore knows the counts of the whole
global batch without communication, and reads only the tokens of its own rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Packing(NamedTuple):
    """The layout and the row length, which determine how records fill rows."""

    layout: Layout
    row_length: int


class Consumed(NamedTuple):
    """Counters of a stream of rows, over all ranks. Means of several steps need not be integers."""

    steps: float = 0
    records: float = 0
    tokens: float = 0
    """Corpus tokens."""


def make_order(corpus: Corpus, seed: int, weights: Sequence[float]) -> Order:
    """Return the order of a corpus. `weights` lists the occurrences per epoch of the records of each source."""
    return Order([(source.first, source.records, weights[source.number]) for source in corpus.sources], seed)


class _RowPlan(NamedTuple):
    """Packing of the records of a window, from one of its rows on."""

    dropout: float
    first: int
    """Row of the window at which the plan begins."""
    packing: int = 0


class Loader:
    """A stream of rows that is endless or `epochs` long and can be resumed at any row.

    `weights` lists the number of occurrences per epoch of the records of each source; default: as in the manifest.
    `dropout` is the fraction of records that are excluded from the pair loss in a pass over their source. They are
    drawn from seed, pass and record, and the space of their pair segments is used by other records. If the dropout
    changes during the run, `dropout_at` returns it for what has been consumed before a step; 1 excludes all records. At
    a change, the remaining records of the window are planned anew, so each record still occurs once. The same happens
    if the state comes from a run with a different packing; `earlier` lists the packings of the runs that this run
    continues, the oldest first. Raises UserError if the epochs contain no records.
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
        dropout_at: Callable[[Consumed], float] | None = None,
        epochs: int | None = None,
        earlier: Sequence[Packing] = (),
    ):
        self.corpus, self.layout, self.row_length = corpus, layout, row_length
        packing = Packing(layout, row_length)
        self._packings = [other for number, other in enumerate(earlier) if other not in earlier[:number]]
        if packing not in self._packings:
            self._packings.append(packing)
        self._packing = self._packings.index(packing)
        self.seed, self.dropout, self.epochs = seed, dropout, epochs
        self._dropout_at = dropout_at
        weights = source_weights(corpus.manifest) if weights is None else weights
        self.order = make_order(corpus, seed, weights)
        if self.order.records_in_epochs(epochs or 1000) == 0:
            raise UserError(
                f"{f'{epochs} epochs' if epochs else 'a thousand epochs'} of {corpus.folder} contain no records: "
                "raise data.sources.N.weight of its sources"
            )
        self.epoch = self.window = self.row = 0
        self.consumed = Consumed()
        self._plans: list[_RowPlan] = []  # of this window
        self._replayed = 0  # number of these plans that are computed
        self._rows: Rows  # of the last computed plan

    @property
    def records(self) -> int:
        """Number of records in all epochs; 0 if the stream is endless."""
        return self.order.records_in_epochs(self.epochs) if self.epochs else 0

    def state(self) -> dict[str, Any]:
        """Return the position in the stream; it is the same on every rank and for any number of ranks.

        `plans` lists the dropout, the first row and the packing of each plan of the window. A packing is an index into
        the different packings of the runs that this run continues, and of this run.
        """
        plans = [list(plan) for plan in self._plans]
        return {"epoch": self.epoch, "window": self.window, "row": self.row, "plans": plans}

    def load_state(self, state: Mapping[str, Any], consumed: Consumed = Consumed()) -> None:  # noqa: B008 (immutable)
        """Continue from a `state()`. `consumed` counts what was returned before it.

        A state of an earlier version has no plans, because the dropout was constant, or plans without a packing.
        """
        self.epoch, self.window, self.row = state["epoch"], state["window"], state["row"]
        plans = state.get("plans", [(self.dropout, 0)] if self.row else [])
        self._plans = [_RowPlan(*plan) for plan in plans]
        self._replayed = 0
        self.consumed = consumed

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
        dropout = self._current_dropout()
        while missing and not self.exhausted:
            last = self._plans[-1] if self._plans else None
            if last is None or (last.dropout, last.packing) != (dropout, self._packing):
                self._plans.append(_RowPlan(dropout, self.row, self._packing))
            rows = self._plan()
            first = self.row - self._plans[-1].first
            take = min(missing, rows.count - first)
            parts.append(rows.select(first, first + take))
            missing -= take
            self.row += take
            if first + take == rows.count:
                self._next_window()
        if not parts:
            raise ValueError("the loader is exhausted")
        joined = Rows.join(parts, count)
        steps, records, tokens = self.consumed
        self.consumed = Consumed(steps + 1, records + len(joined.records), tokens + int(joined.lengths.sum()))
        return joined

    def _current_dropout(self) -> float:
        if self._dropout_at is None or not self.layout.read_outs:  # without pairs it makes no difference
            return self.dropout
        return self._dropout_at(self.consumed)

    def _next_window(self) -> None:
        self.row = self._replayed = 0
        self._plans = []
        self.window += 1
        if self.window == self.order.windows(self.epoch):
            self.window = 0
            self.epoch += 1

    def _plan(self) -> Rows:
        """Return the rows of the last plan of the window; the first of them is the row at which the plan begins.

        Each plan packs the records of the rows that the previous plan has not returned.
        """
        while self._replayed < len(self._plans):
            number = self._replayed
            dropout, first, packing = self._plans[number]
            layout, row_length = self._packings[packing]
            if number == 0:
                records, passes = self.order.window(self.epoch, self.window)
                random_bits = draw_random_bits(records, self.seed, passes)
            else:
                returned = self._check_row(first, self._plans[number - 1].first)
                remaining = self._rows.select(returned, self._rows.count)
                records, random_bits = remaining.records, remaining.random_bits
            paired = _drawn_pairs(random_bits, dropout) & bool(layout.read_outs)
            rows = plan_rows(self.corpus, records, layout, row_length, paired, random_bits)
            rng = np.random.default_rng([self.seed, self.epoch, self.window, 1, *([number] if number else [])])
            self._rows = _shuffled(rows, rng)
            self._replayed += 1
        self._check_row(self.row, self._plans[-1].first)
        return self._rows

    def _check_row(self, row: int, first: int) -> int:
        """Return the number of returned rows of a plan. Raises ValueError if it has no such row."""
        returned = row - first
        if row and returned >= self._rows.count:
            raise ValueError(
                f"the state of the loader is row {row} of a window of {first + self._rows.count} rows: it was saved by "
                "a version with a different packing"
            )
        return returned


def _drawn_pairs(random_bits: np.ndarray, dropout: float) -> np.ndarray:
    """Return the pair flags of records with these random numbers; a higher dropout excludes the same records and more.

    1 excludes all, because 2**64 is not a uint64.
    """
    if dropout >= 1:
        return np.zeros(len(random_bits), bool)
    drawn: np.ndarray = random_bits >= np.uint64(dropout * 2**64)
    return drawn


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
