"""Next-token prediction."""

from collections.abc import Callable

import torch

from pretrain.data.batch import Batch
from pretrain.data.loader import count_targets
from pretrain.objectives.base import ForwardPass, ModelShape, Objective, ObjectiveOutput, Term
from pretrain.objectives.configs.next_token import Config
from pretrain.objectives.pool import gather_pool, select_pair_embeddings


def next_token_sum(
    hidden: torch.Tensor, batch: Batch, cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the sum of cross-entropies of the labelled positions, in nats; the head runs only on these positions."""
    return cross_entropy(hidden[batch.label_index], batch.label_ids)


class NextToken(Objective):
    """The language-model loss alone."""

    def __init__(self) -> None:
        super().__init__({"lm": Term(1.0, count_targets)})

    def forward(self, forward_pass: ForwardPass, *, with_pool: bool = False) -> ObjectiveOutput:
        """Return the term of a micro batch; see `Objective`."""
        batch, hidden = forward_pass.batch, forward_pass.hidden
        pool = gather_pool(*select_pair_embeddings(hidden, batch), batch, forward_pass.gather) if with_pool else None
        return ObjectiveOutput({"lm": next_token_sum(hidden, batch, forward_pass.head.cross_entropy)}, pool)


def from_config(config: Config, shape: ModelShape) -> NextToken:
    """Return the objective of a configuration."""
    return NextToken()
