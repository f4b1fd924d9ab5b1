"""The base class of objectives with auxiliary terms and optional regularizers."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch

from pretrain.data.loader import count_pairs, count_targets
from pretrain.objectives.base import ForwardPass, Objective, ObjectiveOutput, Term
from pretrain.objectives.next_token import next_token_sum
from pretrain.objectives.pool import Pool, gather_pool, select_pair_embeddings
from pretrain.objectives.regularizers import Regularizer


class AuxiliaryObjective(Objective):
    """The language-model loss, auxiliary terms such as `jepa`, and regularizers."""

    pooled = False
    """Whether an auxiliary term needs the pairs of all ranks."""

    def __init__(self, auxiliary_terms: Mapping[str, Term], regularizers: Sequence[Regularizer] = ()):
        super().__init__(
            {"lm": Term(1.0, count_targets)}
            | dict(auxiliary_terms)
            | {one.name: Term(one.weight, count_pairs) for one in regularizers}
        )
        self.regularizers = list(regularizers)

    @abstractmethod
    def auxiliary_sums(
        self, forward_pass: ForwardPass, prediction: torch.Tensor, target: torch.Tensor, pool: Pool | None
    ) -> dict[str, torch.Tensor]:
        """Return this rank's sum of each auxiliary term.

        `prediction` and `target` (P, D) are the embeddings of this rank's pairs. `pool` is not None if `pooled` is set.
        """

    def forward(self, forward_pass: ForwardPass, *, with_pool: bool = False) -> ObjectiveOutput:
        """Return the terms of a micro batch; see `Objective`."""
        batch, hidden = forward_pass.batch, forward_pass.hidden
        context, target = select_pair_embeddings(hidden, batch)
        prediction = self.predict(context)
        pooled = with_pool or self.pooled or bool(self.regularizers)
        pool = gather_pool(prediction, target, batch, forward_pass.gather) if pooled else None
        terms = {
            "lm": next_token_sum(hidden, batch, forward_pass.head.cross_entropy),
            **self.auxiliary_sums(forward_pass, prediction, target, pool),
        }
        if pool is not None:
            terms |= {one.name: one.of_pool(pool, batch.seed) for one in self.regularizers}
        return ObjectiveOutput(terms, pool)
