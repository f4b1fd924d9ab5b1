"""The tensors of one micro batch, laid out by array operations over all of its records at once."""

from dataclasses import dataclass, fields

import numpy as np
import torch

from pretrain.data.corpus import Corpus
from pretrain.data.layout import TARGET, Layout, Specials
from pretrain.data.loader import Rows
from pretrain.data.ragged import mix, ranges, run_sums


@dataclass(frozen=True)
class Batch:
    """B rows of L positions, M next-token labels, P pairs.

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
    pair_key: torch.Tensor
    """(P,) hash of the target's tokens: equal keys are equal targets."""
    pair_valid: torch.Tensor
    """(P,) False for the padding of the gather."""

    def to(self, device: torch.device) -> "Batch":
        """A copy on `device`."""
        return Batch(**{field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)})


def assemble(rows: Rows, corpus: Corpus, layout: Layout, specials: Specials, row_length: int, pairs_padded: int) -> Batch:
    """Fill the rows with the tokens of their records."""
    size = rows.count * row_length
    ids = np.full(size, specials.pad, np.int64)
    positions = np.zeros(size, np.int64)
    visible_until = np.tile(np.arange(1, row_length + 1), rows.count)
    label_index: list[np.ndarray] = []
    read_out: dict[int, np.ndarray] = {}
    keys = np.zeros(0, np.uint64)

    lengths = rows.segment_lengths
    in_row = rows.start[:, None] + np.cumsum(lengths, axis=1) - lengths
    in_batch = rows.row[:, None] * row_length + in_row
    first_position = _first_positions(layout, lengths)
    subtree_end = in_row + _subtree_lengths(layout, lengths)

    for index, segment in enumerate(layout.segments):
        present = np.flatnonzero(lengths[:, index])
        base, length = in_batch[present, index], lengths[present, index]
        for offset, token in enumerate(segment.prefix):
            ids[base + offset] = token
        for offset, token in enumerate(segment.suffix):
            ids[base + length - len(segment.suffix) + offset] = token
        inner = length - len(segment.prefix) - len(segment.suffix)
        if segment.view is None:
            tokens = specials.predictor + ranges(np.zeros_like(inner), inner)
        else:
            tokens = corpus.tokens(rows.records[present], segment.view)
        ids[ranges(base + len(segment.prefix), inner)] = tokens
        everywhere = ranges(base, length)
        positions[everywhere] = ranges(first_position[present, index], length)
        visible_until[everywhere] = np.repeat(subtree_end[present, index], length)
        if segment.lm_from is not None:
            label_index.append(ranges(base + segment.lm_from, length - segment.lm_from) - 1)
        if layout.read_outs and index in layout.read_outs:
            read_out[index] = (in_batch[:, index] + lengths[:, index] - 1)[rows.paired]
        if layout.read_outs and index == layout.read_outs[1]:
            assert segment.view == TARGET
            keys = _content_keys(tokens, inner)[rows.paired[present]]

    labels = np.concatenate(label_index) if label_index else np.zeros(0, np.int64)
    prediction, target = (read_out[index] for index in layout.read_outs) if layout.read_outs else (np.zeros(0, np.int64),) * 2
    valid = np.arange(pairs_padded) < len(prediction)
    shape = (rows.count, row_length)
    return Batch(
        token_ids=torch.from_numpy(ids.reshape(shape)),
        positions=torch.from_numpy(positions.reshape(shape)),
        visible_until=torch.from_numpy(visible_until.reshape(shape)),
        label_index=torch.from_numpy(labels),
        label_ids=torch.from_numpy(ids[labels + 1]),
        prediction_index=torch.from_numpy(_padded(prediction, pairs_padded)),
        target_index=torch.from_numpy(_padded(target, pairs_padded)),
        pair_key=torch.from_numpy(_padded(keys.view(np.int64), pairs_padded)),
        pair_valid=torch.from_numpy(valid),
    )


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


def _content_keys(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each run of tokens: (sum of lengths,), (N,) -> (N,)."""
    place = ranges(np.zeros_like(lengths), lengths).astype(np.uint64)
    return run_sums(mix(tokens.astype(np.uint64) ^ (place << np.uint64(32))), lengths) ^ mix(lengths.astype(np.uint64))


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros(size, values.dtype)
    out[: len(values)] = values
    return out
