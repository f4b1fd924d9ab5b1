"""The pairs of a micro step over all ranks: what contrastive terms and embedding monitors look at."""

from collections.abc import Callable
from dataclasses import dataclass

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
    valid: torch.Tensor
    """(Q,) False for padding."""
    own: slice
    """The pairs of this rank."""

    def detached(self) -> "Pool":
        """The same without a graph."""
        return Pool(self.prediction.detach(), self.target.detach(), self.key, self.valid, self.own)


def read_out(hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and targets of this rank's pairs in fp32: (B * L, D) -> (P, D), (P, D)."""
    return hidden[batch.prediction_index].float(), hidden[batch.target_index].float()


def gather_pool(prediction: torch.Tensor, target: torch.Tensor, batch: Batch, gather: Gather) -> Pool:
    """Put the pairs of all ranks together; gradients flow into this rank's own slice.

    A loss over the whole pool on every rank then needs no communication in the backward pass: summed over ranks, the
    gradients of the slices are the gradient of the loss.
    """
    size = len(prediction)
    own = slice(gather.rank * size, (gather.rank + 1) * size)

    def attach(mine: torch.Tensor) -> torch.Tensor:
        everyone = gather.all_gather(mine.detach())
        return torch.cat([everyone[: own.start], mine, everyone[own.stop :]])

    return Pool(attach(prediction), attach(target), gather.all_gather(batch.pair_key), gather.all_gather(batch.pair_valid), own)
