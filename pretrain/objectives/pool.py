"""The pairs of a micro step over all ranks: what contrastive terms, regularizers and embedding monitors look at."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pretrain.data.batch import Batch


@dataclass(frozen=True)
class Gather:
    """How values of all ranks come together: `all_gather` maps (P, ...) to (ranks * P, ...), in rank order, without a graph."""

    all_gather: Callable[[torch.Tensor], torch.Tensor]
    rank: int


@dataclass(frozen=True)
class Pool:
    """Q = ranks * P pairs. Only this rank's own slice is attached to the graph."""

    prediction: torch.Tensor
    """(Q, D) fp32."""
    target: torch.Tensor
    """(Q, D) fp32."""
    key: torch.Tensor
    """(Q,) equal keys are equal targets."""
    record: torch.Tensor
    """(Q,) number of the record."""
    direction: torch.Tensor
    """(Q,) FORWARD or BACKWARD."""
    valid: torch.Tensor
    """(Q,) False for padding."""
    local_slice: slice
    """The pairs of this rank."""

    def with_detached_targets(self) -> "Pool":
        """The same without a gradient into the targets."""
        return replace(self, target=self.target.detach())

    def detached(self) -> "Pool":
        """The same without a graph."""
        return replace(self, prediction=self.prediction.detach(), target=self.target.detach())

    def negatives_mask(self) -> torch.Tensor:
        """Whose target is another thing than whose: (Q, Q), row i true at the valid pairs of other records with other targets of the same kind."""
        other = (self.key[:, None] != self.key) & (self.record[:, None] != self.record)
        return other & (self.direction[:, None] == self.direction) & self.valid

    @staticmethod
    def join(pools: list["Pool"]) -> "Pool":
        """Several pools as one, without an own slice."""
        joined = {
            name: torch.cat([getattr(pool, name) for pool in pools])
            for name in ("prediction", "target", "key", "record", "direction", "valid")
        }
        return Pool(**joined, local_slice=slice(0, 0))


def local_value_global_grad(whole: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The value of this rank's share of a loss over the pool, with the gradient of the whole of it.

    This rank's embeddings act on the losses of other ranks' pairs too. Each rank computes the whole loss with its own slice
    attached: summed over ranks, the gradients of the slices are the gradient of the loss.
    """
    return share.detach() + (whole - whole.detach())


def select_pair_embeddings(hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and targets of this rank's pairs in fp32: (B * L, D) -> (P, D), (P, D)."""
    return hidden[batch.prediction_index].float(), hidden[batch.target_index].float()


def gather_pool(prediction: torch.Tensor, target: torch.Tensor, batch: Batch, gather: Gather) -> Pool:
    """Put the pairs of all ranks together; gradients flow into this rank's own slice."""
    size = len(prediction)
    local_slice = slice(gather.rank * size, (gather.rank + 1) * size)
    mine = torch.cat([prediction, target], dim=1)
    everyone = gather.all_gather(mine.detach())
    predictions, targets = torch.cat([everyone[: local_slice.start], mine, everyone[local_slice.stop :]]).chunk(
        2, dim=1
    )
    key, record, direction, valid = gather.all_gather(
        torch.stack([batch.pair_target_hash, batch.pair_record, batch.pair_direction, batch.pair_valid.long()], dim=1)
    ).unbind(dim=1)
    return Pool(predictions, targets, key, record, direction, valid.bool(), local_slice)
