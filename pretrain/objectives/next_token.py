"""Next-token prediction."""

import torch
import torch.nn.functional as F

from pretrain.data.batch import Batch
from pretrain.objectives.base import Head, Output
from pretrain.objectives.pool import Gather, gather_pool, read_out


def next_token_sum(hidden: torch.Tensor, batch: Batch, head: Head) -> torch.Tensor:
    """Sum of the cross-entropies of the labelled positions, in nats; the head runs on those alone."""
    logits = head(hidden[batch.label_index]).float()
    return F.cross_entropy(logits, batch.label_ids, reduction="sum")


class NextToken:
    """The language-model loss alone."""

    def __init__(self) -> None:
        self.weights = {"lm": 1.0}

    def __call__(self, hidden: torch.Tensor, batch: Batch, head: Head, gather: Gather, *, with_pool: bool = False) -> Output:
        pool = gather_pool(*read_out(hidden, batch), batch, gather) if with_pool else None
        return Output({"lm": next_token_sum(hidden, batch, head)}, pool)
