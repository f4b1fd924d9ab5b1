"""The base class of objectives with an auxiliary term and optional regularizers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from pretrain.data.batch import Batch
from pretrain.data.loader import Unit, count_pairs, count_targets
from pretrain.objectives.base import CrossEntropy, ObjectiveOutput
from pretrain.objectives.next_token import next_token_sum
from pretrain.objectives.pool import Gather, Pool, gather_pool, select_pair_embeddings
from pretrain.objectives.regularizers import Regularizer


class AuxiliaryObjective(ABC):
    """The language-model loss, one auxiliary term `jepa`, and regularizers."""

    pooled = False
    """Whether the auxiliary term needs the pairs of all ranks."""

    def __init__(self, weight: float, unit: Unit, regularizers: Sequence[Regularizer]):
        self.regularizers = list(regularizers)
        self.weights: Mapping[str, float] = {"lm": 1.0, "jepa": weight} | {one.name: one.weight for one in regularizers}
        self.units: Mapping[str, Unit] = {"lm": count_targets, "jepa": unit} | dict.fromkeys(
            (one.name for one in regularizers), count_pairs
        )

    @abstractmethod
    def auxiliary_sum(
        self, hidden: torch.Tensor, prediction: torch.Tensor, target: torch.Tensor, batch: Batch, pool: Pool | None
    ) -> torch.Tensor:
        """Return this rank's sum of the auxiliary term.

        `hidden` is (B * L, D); its read-outs `prediction` and `target` are (P, D). `pool` is not None
        if `pooled` is set.
        """

    def __call__(
        self,
        hidden: torch.Tensor,
        batch: Batch,
        cross_entropy: CrossEntropy,
        gather: Gather,
        *,
        with_pool: bool = False,
    ) -> ObjectiveOutput:
        """Return the terms of a micro batch; see `Objective`."""
        prediction, target = select_pair_embeddings(hidden, batch)
        pooled = with_pool or self.pooled or bool(self.regularizers)
        pool = gather_pool(prediction, target, batch, gather) if pooled else None
        terms = {
            "lm": next_token_sum(hidden, batch, cross_entropy),
            "jepa": self.auxiliary_sum(hidden, prediction, target, batch, pool),
        }
        if pool is not None:
            terms |= {one.name: one.of_pool(pool, batch.seed) for one in self.regularizers}
        return ObjectiveOutput(terms, pool)
