"""The tensors of one micro batch, laid out by array operations over all of its records at once."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch

from data_prep.ragged import ragged_ranges
from data_prep.shards import RecordTokens
from pretrain.data.corpus import Corpus
from pretrain.data.layout import Layout, Segment, SpecialTokenIds
from pretrain.data.loader import Rows
from pretrain.data.spans import STRETCHES, draw_spans


@dataclass(frozen=True)
class Batch:
    """B rows of L positions, M next-token labels, P pairs, S spans.

    Indices are into the flattened (B * L) positions. The pair arrays are padded with index 0 and `pair_valid` False to
    the same P on every rank, so that embeddings can be gathered.
    """

    token_ids: torch.Tensor
    """(B, L); predictor tokens have ids from the vocabulary size on."""
    positions: torch.Tensor
    """(B, L) position of each token within its own encoding."""
    visible_until: torch.Tensor
    """(B, L) query q sees key p exactly if p <= q < visible_until[p]. Padding sees itself."""
    label_index: torch.Tensor
    """(M,) positions that predict a token."""
    label_ids: torch.Tensor
    """(M,) the token that each of them predicts."""
    prediction_index: torch.Tensor
    """(P,) where the context's embedding is read."""
    target_index: torch.Tensor
    """(P,) where the target's embedding is read."""
    pair_target_hash: torch.Tensor
    """(P,) hash of the target's tokens: equal keys are equal targets."""
    pair_record: torch.Tensor
    """(P,) number of the record: pairs of one record are not strangers to each other."""
    pair_direction: torch.Tensor
    """(P,) FORWARD or BACKWARD."""
    pair_valid: torch.Tensor
    """(P,) False for the padding of the gather."""
    span_index: torch.Tensor
    """(S, 3, 2) three stretches (from, to) of each span; see pretrain/data/spans.py."""
    seed: torch.Tensor
    """A random number of the micro step, on the host: the same on every rank, and for any number of them."""

    def pin_memory_copy(self) -> "Batch":
        """A copy in pinned memory, from which copies to a CUDA device run beside the computation."""
        return Batch(**{field.name: getattr(self, field.name).pin_memory() for field in fields(self)})

    def to(self, device: torch.device) -> "Batch":
        """A copy on `device`, but for the seed."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in fields(self)
            if field.name != "seed"
        }
        return Batch(**moved, seed=self.seed)


def micro_batches(
    rows: Rows,
    corpus: Corpus,
    layout: Layout,
    specials: SpecialTokenIds,
    row_length: int,
    *,
    micro_batch_rows: int,
    rank: int,
    ranks: int,
) -> Iterator[Batch]:
    """The micro batches of one rank. Rank r's share of micro step a is the r-th part of its rows.

    So a micro step holds the same rows on any number of ranks. `rows.count` is a multiple of micro_batch_rows * ranks.
    """
    per_row = np.bincount(
        rows.row, layout.pairs(rows.segment_lengths, rows.paired).sum(axis=1), minlength=rows.count
    ).astype(np.int64)
    padded = per_row.reshape(-1, ranks, micro_batch_rows).sum(axis=2).max(axis=1)
    steps = [
        rows.select(first, first + ranks * micro_batch_rows) for first in range(0, rows.count, ranks * micro_batch_rows)
    ]
    mine = [step.select(rank * micro_batch_rows, (rank + 1) * micro_batch_rows) for step in steps]
    ends = np.cumsum([len(each.records) for each in mine])
    contents = corpus.read(
        np.concatenate([each.records for each in mine])
    )  # of all micro steps at once: fewer, larger reads of each shard
    for together, each, pairs, end in zip(steps, mine, padded, ends, strict=True):
        seed = int(together.random_bits.sum(dtype=np.uint64) >> np.uint64(1))
        yield assemble(
            each, corpus, layout, specials, row_length, int(pairs), seed, contents.select(end - len(each.records), end)
        )


def assemble(
    rows: Rows,
    corpus: Corpus,
    layout: Layout,
    specials: SpecialTokenIds,
    row_length: int,
    pairs_padded: int,
    seed: int = 0,
    contents: RecordTokens | None = None,
) -> Batch:
    """Fill the rows with the tokens of their records; the pair arrays are padded to `pairs_padded`.

    `contents` are the tokens, where they have been read already. In a record that goes on in the next one, the next one's first token
    stands in place of the end token: it is no end, and every token of the document is a target.
    """
    contents = contents or corpus.read(rows.records)
    lengths, size = rows.segment_lengths, rows.count * row_length
    in_row = rows.start[:, None] + np.cumsum(lengths, axis=1) - lengths
    in_batch = rows.row[:, None] * row_length + in_row
    ids = np.full(size, specials.pad, np.int64)
    label_index: list[np.ndarray] = []
    for index, segment in enumerate(layout.segments):
        present = np.flatnonzero(lengths[:, index])
        base, length = in_batch[present, index], lengths[present, index]
        for offset, token in enumerate(segment.prefix):
            ids[base + offset] = token
        suffixes = _suffixes(segment, layout, rows.lengths[present], contents.continuation_tokens[present])
        for offset, closing in enumerate(suffixes):
            ids[base + length - len(segment.suffix) + offset] = closing
        inner = length - len(segment.prefix) - len(segment.suffix)
        if segment.view is None:
            tokens = specials.predictor + ragged_ranges(np.zeros_like(inner), inner)
        else:
            tokens = contents.tokens[ragged_ranges(contents.starts[present, segment.view], inner)]
        ids[ragged_ranges(base + len(segment.prefix), inner)] = tokens
        if segment.lm_start is not None:
            targets = layout.count_segment_targets(segment, rows.lengths[present], length)
            label_index.append(ragged_ranges(base + segment.lm_start, targets) - 1)

    labels = np.concatenate([np.zeros(0, np.int64), *label_index])
    positions, visible_until = _places(rows, layout, in_row, row_length)
    spans = (
        draw_spans(layout, in_batch, lengths, rows.random_bits)
        if layout.spans
        else np.zeros((0, STRETCHES, 2), np.int64)
    )
    return Batch(
        token_ids=torch.from_numpy(ids).view(rows.count, row_length),
        positions=torch.from_numpy(positions).view(rows.count, row_length),
        visible_until=torch.from_numpy(visible_until).view(rows.count, row_length),
        label_index=torch.from_numpy(labels),
        label_ids=torch.from_numpy(ids[labels + 1]),
        **_pairs(rows, layout, in_batch + lengths - 1, contents.hashes, pairs_padded),
        span_index=torch.from_numpy(spans),
        seed=torch.tensor(seed),
    )


def _places(rows: Rows, layout: Layout, in_row: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Position within its encoding and end of visibility of every position, (B * L,) both, from the starts of the segments (N, segments)."""
    lengths = rows.segment_lengths
    positions = np.zeros(rows.count * row_length, np.int64)
    visible_until = np.tile(np.arange(1, row_length + 1), rows.count)
    # segments stand one behind the other, in every record
    everywhere = ragged_ranges(rows.row * row_length + rows.start, lengths.sum(axis=1))
    positions[everywhere] = ragged_ranges(_first_positions(layout, lengths).ravel(), lengths.ravel())
    visible_until[everywhere] = np.repeat((in_row + _subtree_lengths(layout, lengths)).ravel(), lengths.ravel())
    return positions, visible_until


def _suffixes(
    segment: Segment, layout: Layout, lengths: np.ndarray, continuation_tokens: np.ndarray
) -> list[np.ndarray]:
    """Each closing token of a segment in the records (N, views) that have it, (N,) each; `closing` (N,) takes the place of the last, or is -1."""
    if not segment.suffix:
        return []
    last = layout.is_last(segment, lengths)
    *before, end = (
        np.where(last, at_last, token)
        for token, at_last in zip(segment.suffix, segment.last_suffix or segment.suffix, strict=True)
    )
    return [*before, np.where(last & (continuation_tokens >= 0), continuation_tokens, end)]


def _pairs(rows: Rows, layout: Layout, ends: np.ndarray, hashes: np.ndarray, size: int) -> dict[str, torch.Tensor]:
    """The pair fields of a batch, padded to `size`, from the last positions of all segments (N, segments) and hashes of the views (N, views)."""
    present = layout.pairs(rows.segment_lengths, rows.paired)
    record, number = np.nonzero(present)
    prediction, target, direction = (
        np.array([(pair.prediction, pair.target, pair.direction) for pair in layout.read_outs], np.int64)
        .reshape(-1, 3)[number]
        .T
    )
    view = np.array([-1 if segment.view is None else segment.view for segment in layout.segments])[target]
    fields = {
        "prediction_index": ends[record, prediction],
        "target_index": ends[record, target],
        "pair_target_hash": hashes[record, view].view(np.int64),
        "pair_record": rows.records[record],
        "pair_direction": direction,
    }
    valid = np.arange(size) < len(record)
    return {name: torch.from_numpy(_padded(values, size)) for name, values in fields.items()} | {
        "pair_valid": torch.from_numpy(valid)
    }


def _first_positions(layout: Layout, lengths: np.ndarray) -> np.ndarray:
    """Position ids go on where the parent ends, and start at 0 without one: (N, segments)."""
    first = np.zeros_like(lengths)
    for index, segment in enumerate(layout.segments):
        if segment.parent is not None:
            first[:, index] = first[:, segment.parent] + lengths[:, segment.parent]
    return first


def _subtree_lengths(layout: Layout, lengths: np.ndarray) -> np.ndarray:
    """Tokens of every segment and all below it: (N, segments)."""
    subtree = lengths.copy()
    for index in range(len(layout.segments) - 1, -1, -1):
        parent = layout.segments[index].parent
        if parent is not None:
            subtree[:, parent] += subtree[:, index]
    return subtree


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros(size, values.dtype)
    out[: len(values)] = values
    return out
