"""Next-token prediction."""

from typing import Literal

import torch

from pretrain.data.batch import Batch
from pretrain.objectives.base import CrossEntropy, ObjectiveConfig, Output
from pretrain.objectives.pool import Gather, gather_pool, read_out


class Config(ObjectiveConfig):
    """The language-model loss alone; keys of the other objectives rest."""

    name: Literal["next_token"]
    """The language-model loss alone."""

    def build(self) -> "NextToken":
        return NextToken()


def next_token_sum(hidden: torch.Tensor, batch: Batch, cross_entropy: CrossEntropy) -> torch.Tensor:
    """Sum of the cross-entropies of the labelled positions, in nats; the head runs on those alone."""
    return cross_entropy(hidden[batch.label_index], batch.label_ids)


class NextToken:
    """The language-model loss alone."""

    weights = {"lm": 1.0}
    units = {"lm": "targets"}

    def __call__(self, hidden: torch.Tensor, batch: Batch, cross_entropy: CrossEntropy, gather: Gather, *, with_pool: bool = False) -> Output:
        pool = gather_pool(*read_out(hidden, batch), batch, gather) if with_pool else None
        return Output({"lm": next_token_sum(hidden, batch, cross_entropy)}, pool)
