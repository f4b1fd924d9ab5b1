"""The pool: the pairs of a micro step over all ranks, for contrastive terms, regularizers and embedding monitors."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pretrain.data.batch import Batch


@dataclass(frozen=True)
class Gather:
    """The gathering of values from all ranks.

    `all_gather` maps (P, ...) to (ranks * P, ...) in rank order, without a graph.
    """

    all_gather: Callable[[torch.Tensor], torch.Tensor]
    rank: int


@dataclass(frozen=True)
class Pool:
    """Q = ranks * P pairs. Only this rank's own slice is attached to the graph."""

    prediction: torch.Tensor
    """(Q, D) predictions in fp32."""
    target: torch.Tensor
    """(Q, D) target embeddings in fp32."""
    key: torch.Tensor
    """(Q,) hash of the target: equal keys mean equal targets."""
    record: torch.Tensor
    """(Q,) number of the record."""
    direction: torch.Tensor
    """(Q,) FORWARD or BACKWARD."""
    valid: torch.Tensor
    """(Q,) False for padding."""
    local_slice: slice
    """The pairs of this rank."""

    def with_detached_targets(self) -> "Pool":
        """Return the pool without a gradient into the targets."""
        return replace(self, target=self.target.detach())

    def detached(self) -> "Pool":
        """Return the pool without a graph."""
        return replace(self, prediction=self.prediction.detach(), target=self.target.detach())

    def negatives_mask(self) -> torch.Tensor:
        """Return the mask of the negatives of each pair, (Q, Q).

        Row i is True at the valid pairs of other records that have a different target and the same direction.
        """
        other = (self.key[:, None] != self.key) & (self.record[:, None] != self.record)
        return other & (self.direction[:, None] == self.direction) & self.valid

    @staticmethod
    def join(pools: list["Pool"]) -> "Pool":
        """Return several pools as one; its slice for this rank is empty."""
        joined = {
            name: torch.cat([getattr(pool, name) for pool in pools])
            for name in ("prediction", "target", "key", "record", "direction", "valid")
        }
        return Pool(**joined, local_slice=slice(0, 0))


def local_value_global_grad(whole: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Return the value of this rank's part of a loss over the pool, with the gradient of the whole loss.

    This rank's embeddings also affect the losses of other ranks' pairs. Each rank therefore computes the whole loss
    with its own slice attached to the graph. The gradients of the slices, summed over ranks, are the gradient of the
    loss.
    """
    return share.detach() + (whole - whole.detach())


def select_pair_embeddings(hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predictions and target embeddings of this rank's pairs in fp32: (B * L, D) -> (P, D), (P, D)."""
    return hidden[batch.prediction_index].float(), hidden[batch.target_index].float()


def gather_embeddings(mine: torch.Tensor, gather: Gather) -> tuple[torch.Tensor, slice]:
    """Gather embeddings of all ranks, (P, D) -> (ranks * P, D); return them with this rank's slice.

    Gradients flow only into this rank's own slice.
    """
    local_slice = slice(gather.rank * len(mine), (gather.rank + 1) * len(mine))
    everyone = gather.all_gather(mine.detach())
    return torch.cat([everyone[: local_slice.start], mine, everyone[local_slice.stop :]]), local_slice


def gather_pool(prediction: torch.Tensor, target: torch.Tensor, batch: Batch, gather: Gather) -> Pool:
    """Gather the pairs of all ranks into a pool; gradients flow only into this rank's own slice."""
    embeddings, local_slice = gather_embeddings(torch.cat([prediction, target], dim=1), gather)
    predictions, targets = embeddings.chunk(2, dim=1)
    key, record, direction, valid = gather.all_gather(
        torch.stack([batch.pair_target_hash, batch.pair_record, batch.pair_direction, batch.pair_valid.long()], dim=1)
    ).unbind(dim=1)
    return Pool(predictions, targets, key, record, direction, valid.bool(), local_slice)
