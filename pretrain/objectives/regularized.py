"""Next-token prediction with regularizers, but without a term on pairs.

The regularized embeddings are the hidden states at the ends of views in the text that the language model reads: what a
target in context is in LLM-JEPA. This needs no copies, no predictor tokens and no pairs.
"""

from collections.abc import Sequence

import torch

from pretrain.data.loader import count_ends, count_targets
from pretrain.objectives.base import ForwardPass, ModelShape, Objective, ObjectiveOutput, Term
from pretrain.objectives.configs.regularized import Config
from pretrain.objectives.next_token import next_token_sum
from pretrain.objectives.pool import gather_embeddings, gather_pool, select_pair_embeddings
from pretrain.objectives.regularizers import Regularizer, build_regularizers


class Regularized(Objective):
    """The language-model loss and regularizers of the ends of views."""

    def __init__(self, regularizers: Sequence[Regularizer]):
        super().__init__(
            {"lm": Term(1.0, count_targets)} | {one.name: Term(one.weight, count_ends) for one in regularizers}
        )
        self.regularizers = list(regularizers)

    def forward(self, forward_pass: ForwardPass, *, with_pool: bool = False) -> ObjectiveOutput:
        """Return the terms of a micro batch; see `Objective`."""
        batch, hidden, gather = forward_pass.batch, forward_pass.hidden, forward_pass.gather
        ends, local_slice = gather_embeddings(hidden[batch.end_index].float(), gather)
        flags = gather.all_gather(torch.stack([batch.end_valid, batch.end_of_first], dim=1).long())
        valid, of_first = flags.bool().unbind(dim=1)
        groups = [(ends, valid & of_first), (ends, valid & ~of_first)]
        terms = {"lm": next_token_sum(hidden, batch, forward_pass.head.cross_entropy)}
        terms |= {one.name: one(groups, valid, local_slice, batch.seed) for one in self.regularizers}
        pool = gather_pool(*select_pair_embeddings(hidden, batch), batch, gather) if with_pool else None
        return ObjectiveOutput(terms, pool)


def from_config(config: Config, shape: ModelShape) -> Regularized:
    """Return the objective of a configuration."""
    return Regularized(build_regularizers(config.regularizers))
