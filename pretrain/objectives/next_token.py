"""Next-token prediction."""

import torch

from pretrain.data.batch import Batch
from pretrain.data.loader import count_targets
from pretrain.objectives.base import CrossEntropy, ObjectiveOutput
from pretrain.objectives.configs.next_token import Config
from pretrain.objectives.pool import Gather, gather_pool, select_pair_embeddings


def next_token_sum(hidden: torch.Tensor, batch: Batch, cross_entropy: CrossEntropy) -> torch.Tensor:
    """Return the sum of cross-entropies of the labelled positions, in nats; the head runs only on these positions."""
    return cross_entropy(hidden[batch.label_index], batch.label_ids)


class NextToken:
    """The language-model loss alone."""

    weights = {"lm": 1.0}
    units = {"lm": count_targets}

    def __call__(
        self,
        hidden: torch.Tensor,
        batch: Batch,
        cross_entropy: CrossEntropy,
        gather: Gather,
        *,
        with_pool: bool = False,
    ) -> ObjectiveOutput:
        """Return the term of a micro batch; see `Objective`."""
        pool = gather_pool(*select_pair_embeddings(hidden, batch), batch, gather) if with_pool else None
        return ObjectiveOutput({"lm": next_token_sum(hidden, batch, cross_entropy)}, pool)


def from_config(config: Config) -> NextToken:
    """Return the objective of a configuration."""
    return NextToken()
