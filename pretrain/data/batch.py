"""The tensors of one micro batch, laid out by array operations over all of its records at once."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch

from data_prep.layout import Layout, Segment, SpecialTokenIds
from data_prep.shards import RecordTokens
from data_prep.utils.ragged import ragged_ranges
from pretrain.data.corpus import Corpus
from pretrain.data.loader import Rows
from pretrain.data.spans import STRETCHES, draw_spans


@dataclass(frozen=True)
class Batch:
    """A micro batch of one rank: B rows of L positions, M next-token labels, P pairs, E ends and S spans.

    Indices refer to the flattened (B * L) positions. P is the same on every rank because embeddings are gathered: the
    pair arrays are padded with index 0, and `pair_valid` is False there.
    """

    token_ids: torch.Tensor
    """(B, L) token ids; the ids of predictor tokens start at the vocabulary size."""
    positions: torch.Tensor
    """(B, L) position of each token within its own encoding."""
    visible_until: torch.Tensor
    """(B, L) end of visibility: query q sees key p exactly if p <= q < visible_until[p]. Padding sees only itself."""
    label_index: torch.Tensor
    """(M,) positions that predict a token."""
    label_ids: torch.Tensor
    """(M,) token that each of these positions predicts."""
    prediction_index: torch.Tensor
    """(P,) position from which the prediction is read."""
    target_index: torch.Tensor
    """(P,) position from which the target embedding is read."""
    pair_target_hash: torch.Tensor
    """(P,) hash of the target's tokens: equal hashes mean equal targets."""
    pair_record: torch.Tensor
    """(P,) number of the record: pairs of one record are not negatives of each other."""
    pair_direction: torch.Tensor
    """(P,) FORWARD or BACKWARD."""
    pair_valid: torch.Tensor
    """(P,) False for padding."""
    end_index: torch.Tensor
    """(E,) last position of each view in the text that the language model reads, if the layout reads these out. Padded
    to the same size on every rank, as pairs are."""
    end_of_first: torch.Tensor
    """(E,) whether this is the end of the first view of its record."""
    end_valid: torch.Tensor
    """(E,) False for padding."""
    span_index: torch.Tensor
    """(S, 3, 2) three stretches (from, to) of each span; see pretrain/data/spans.py."""
    seed: torch.Tensor
    """Random number of the micro step, on the host: the same on every rank, and for any number of ranks."""

    def pin_memory_copy(self) -> "Batch":
        """Return a copy in pinned memory: copies from there to a CUDA device overlap with computation."""
        return Batch(**{field.name: getattr(self, field.name).pin_memory() for field in fields(self)})

    def to(self, device: torch.device) -> "Batch":
        """Return a copy on `device`, except for the seed, which stays on the host."""
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
    """Yield the micro batches of one rank.

    A micro step consists of micro_batch_rows * ranks consecutive rows, and rank r takes the r-th part of them.
    `rows.count` must be a multiple of micro_batch_rows * ranks.
    """

    def largest(per_record: np.ndarray) -> np.ndarray:
        """Return the largest sum of a rank in each micro step: (N,) -> (micro steps,)."""
        per_row = np.bincount(rows.row, per_record, minlength=rows.count).astype(np.int64)
        sums: np.ndarray = per_row.reshape(-1, ranks, micro_batch_rows).sum(axis=2).max(axis=1)
        return sums

    padded_pairs = largest(layout.pairs(rows.segment_lengths, rows.paired).sum(axis=1))
    padded_ends = largest(layout.view_ends(rows.segment_lengths).sum(axis=1))
    steps = [
        rows.select(first, first + ranks * micro_batch_rows) for first in range(0, rows.count, ranks * micro_batch_rows)
    ]
    own_rows = [step.select(rank * micro_batch_rows, (rank + 1) * micro_batch_rows) for step in steps]
    ends = np.cumsum([len(part.records) for part in own_rows])
    # Reading all micro steps at once makes fewer and larger reads of each shard.
    contents = corpus.read(np.concatenate([part.records for part in own_rows]))
    for number, (step, part, end) in enumerate(zip(steps, own_rows, ends, strict=True)):
        yield assemble(
            part,
            corpus,
            layout,
            specials,
            row_length,
            int(padded_pairs[number]),
            int(padded_ends[number]),
            seed=int(step.random_bits.sum(dtype=np.uint64) >> np.uint64(1)),
            contents=contents.select(end - len(part.records), end),
        )


def assemble(
    rows: Rows,
    corpus: Corpus,
    layout: Layout,
    specials: SpecialTokenIds,
    row_length: int,
    padded_pairs: int,
    padded_ends: int | None = None,
    *,
    seed: int = 0,
    contents: RecordTokens | None = None,
) -> Batch:
    """Return the batch of these rows, with the arrays of pairs and of ends padded to these sizes.

    `padded_ends` is by default the number of ends. `contents` are the tokens of the records, if they have been read
    already. A long document may continue in the next record. The first token of the next record then replaces the end
    token, so every token of the document is a target.
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
        for offset, suffix_tokens in enumerate(suffixes):
            ids[base + length - len(segment.suffix) + offset] = suffix_tokens
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
    positions, visible_until = _positions_and_visibility(rows, layout, in_row, row_length)
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
        **_pairs(rows, layout, in_batch + lengths - 1, contents.hashes, padded_pairs),
        **_ends(rows, layout, in_batch + lengths - 1, padded_ends),
        span_index=torch.from_numpy(spans),
        seed=torch.tensor(seed),
    )


def _positions_and_visibility(
    rows: Rows, layout: Layout, in_row: np.ndarray, row_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the position ids and the ends of visibility, both (B * L,).

    `in_row` (N, segments) are the starts of the segments within their rows.
    """
    lengths = rows.segment_lengths
    positions = np.zeros(rows.count * row_length, np.int64)
    visible_until = np.tile(np.arange(1, row_length + 1), rows.count)
    # In every record the segments follow one another without gaps.
    occupied = ragged_ranges(rows.row * row_length + rows.start, lengths.sum(axis=1))
    positions[occupied] = ragged_ranges(_first_positions(layout, lengths).ravel(), lengths.ravel())
    visible_until[occupied] = np.repeat((in_row + _subtree_lengths(layout, lengths)).ravel(), lengths.ravel())
    return positions, visible_until


def _suffixes(
    segment: Segment, layout: Layout, lengths: np.ndarray, continuation_tokens: np.ndarray
) -> list[np.ndarray]:
    """Return the suffix of a segment, token by token: an array (N,) for each, over the N records that have the segment.

    `lengths` (N, views) are the view lengths of these records. `continuation_tokens` (N,) replace the last token of the
    suffix if the segment is the last one of its record; -1 leaves it as it is.
    """
    if not segment.suffix:
        return []
    last = layout.is_last(segment, lengths)
    *before, end = (
        np.where(last, at_last, token)
        for token, at_last in zip(segment.suffix, segment.last_suffix or segment.suffix, strict=True)
    )
    return [*before, np.where(last & (continuation_tokens >= 0), continuation_tokens, end)]


def _pairs(rows: Rows, layout: Layout, ends: np.ndarray, hashes: np.ndarray, size: int) -> dict[str, torch.Tensor]:
    """Return the pair fields of a batch, padded to `size`.

    `ends` (N, segments) are the last positions of the segments, `hashes` (N, views) the hashes of the views.
    """
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


def _ends(rows: Rows, layout: Layout, ends: np.ndarray, size: int | None) -> dict[str, torch.Tensor]:
    """Return the fields of a batch about the ends of views, padded to `size`; `ends` as in `_pairs`."""
    record, segment = np.nonzero(layout.view_ends(rows.segment_lengths))
    size = len(record) if size is None else size
    is_first = np.array([one.view == 0 for one in layout.segments])[segment]
    return {
        "end_index": torch.from_numpy(_padded(ends[record, segment], size)),
        "end_of_first": torch.from_numpy(_padded(is_first, size)),
        "end_valid": torch.from_numpy(np.arange(size) < len(record)),
    }


def _first_positions(layout: Layout, lengths: np.ndarray) -> np.ndarray:
    """Return the first position id of each segment, (N, segments): 0, or the one after the end of its parent."""
    first = np.zeros_like(lengths)
    for index, segment in enumerate(layout.segments):
        if segment.parent is not None:
            first[:, index] = first[:, segment.parent] + lengths[:, segment.parent]
    return first


def _subtree_lengths(layout: Layout, lengths: np.ndarray) -> np.ndarray:
    """Return the number of tokens of each segment and all segments below it in the tree, (N, segments)."""
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
