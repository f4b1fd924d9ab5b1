"""What objectives with a second term share: its weight, the weight's schedule, and regularizers beside it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field, field_validator

from pretrain.data.batch import Batch
from pretrain.objectives.base import CrossEntropy, ObjectiveConfig, Output
from pretrain.objectives.next_token import next_token_sum
from pretrain.objectives.pool import Gather, Pool, gather_pool, read_out
from pretrain.objectives.regularizers import CodingRateConfig, Regularizer, SigregConfig, VicregConfig


class AuxiliaryConfig(ObjectiveConfig):
    """Next-token loss, plus weight times the auxiliary term, plus regularizers."""

    weight: float = Field(default=1.0, gt=0)
    """lambda, the weight of the auxiliary term."""
    weight_schedule: list[tuple[float, float]] | None = None
    """Points (consumed fraction of the budget, factor) of a broken line that multiplies `weight` and the regularizers' weights, as
    in [[0, 0], [0.1, 1]] for a warm-up; constant before the first and after the last. Default: 1 all the way."""
    regularizers: list[Annotated[SigregConfig | VicregConfig | CodingRateConfig, Field(discriminator="name")]] = []
    """Terms against collapse on the embeddings of pairs, see below."""

    @field_validator("weight_schedule")
    @classmethod
    def _rising(cls, points: list[tuple[float, float]] | None) -> list[tuple[float, float]] | None:
        if points is None:
            return None
        fractions = [fraction for fraction, _ in points]
        if not points or any(after <= before for before, after in pairwise(fractions)) or not 0 <= fractions[0] <= fractions[-1] <= 1:
            raise ValueError("give points (fraction, factor) with rising fractions between 0 and 1")
        if any(factor < 0 for _, factor in points) or not any(factor for _, factor in points):
            raise ValueError("factors are not negative, and one at least is above 0")
        return points

    @field_validator("regularizers")
    @classmethod
    def _different(cls, regularizers: list) -> list:
        if len({regularizer.name for regularizer in regularizers}) < len(regularizers):
            raise ValueError("a regularizer is named twice")
        return regularizers

    def factor(self, fraction: float) -> float:
        if self.weight_schedule is None:
            return 1.0
        (first, height), *_ = self.weight_schedule
        if fraction <= first:
            return height
        for (begin, low), (end, high) in pairwise(self.weight_schedule):
            if fraction <= end:
                return low + (high - low) * (fraction - begin) / (end - begin)
        return self.weight_schedule[-1][1]


class AuxiliaryObjective(ABC):
    """The language-model loss, one auxiliary term `jepa`, and regularizers."""

    pooled = False
    """Whether the term looks at the pairs of all ranks."""

    def __init__(self, weight: float, unit: str, regularizers: list[Regularizer]):
        self.regularizers = regularizers
        self.weights: Mapping[str, float] = {"lm": 1.0, "jepa": weight} | {one.name: one.weight for one in regularizers}
        self.units: Mapping[str, str] = {"lm": "targets", "jepa": unit} | {one.name: "pairs" for one in regularizers}

    @abstractmethod
    def auxiliary_sum(self, hidden: torch.Tensor, prediction: torch.Tensor, target: torch.Tensor, batch: Batch, pool: Pool | None) -> torch.Tensor:
        """This rank's sum of the auxiliary term: hidden (B * L, D), its read-outs (P, D) each, and the pool where `pooled`."""

    def __call__(self, hidden: torch.Tensor, batch: Batch, cross_entropy: CrossEntropy, gather: Gather, *, with_pool: bool = False) -> Output:
        prediction, target = read_out(hidden, batch)
        pooled = with_pool or self.pooled or bool(self.regularizers)
        pool = gather_pool(prediction, target, batch, gather) if pooled else None
        terms = {"lm": next_token_sum(hidden, batch, cross_entropy), "jepa": self.auxiliary_sum(hidden, prediction, target, batch, pool)}
        return Output(terms | {one.name: one(pool, batch.seed) for one in self.regularizers}, pool)
