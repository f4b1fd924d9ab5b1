"""The configuration of objectives with an auxiliary term: its weight, the schedule of the weight, and regularizers."""

from itertools import pairwise

from pydantic import Field, field_validator

from data_prep.layout import Pairing
from pretrain.objectives.configs.base import ObjectiveConfig
from pretrain.objectives.configs.regularizers import AnyRegularizerConfig, RegularizerConfig


class RegularizedConfig(ObjectiveConfig):
    """Next-token loss plus terms whose weights may change during the run."""

    weight_schedule: list[tuple[float, float]] | None = None
    """Schedule of a factor on the weights of all terms but `lm`: points (consumed fraction of the budget,
    factor) with linear interpolation. For example, [[0, 0], [0.1, 1]] is a warm-up. The factor is constant before the
    first point and after the last. Default: always 1."""
    regularizers: list[AnyRegularizerConfig] = []
    """Terms against collapse of the embeddings of pairs or, with `regularized`, of the ends of views; see below."""

    @field_validator("weight_schedule")
    @classmethod
    def _rising(cls, points: list[tuple[float, float]] | None) -> list[tuple[float, float]] | None:
        if points is None:
            return None
        fractions = [fraction for fraction, _ in points]
        if (
            not points
            or any(after <= before for before, after in pairwise(fractions))
            or not 0 <= fractions[0] <= fractions[-1] <= 1
        ):
            raise ValueError("must be points (fraction, factor) with increasing fractions between 0 and 1")
        if any(factor < 0 for _, factor in points) or not any(factor for _, factor in points):
            raise ValueError("factors must not be negative, and at least one must be above 0")
        return points

    @field_validator("regularizers")
    @classmethod
    def _different(cls, regularizers: list[RegularizerConfig]) -> list[RegularizerConfig]:
        if len({regularizer.name for regularizer in regularizers}) < len(regularizers):
            raise ValueError("a regularizer is listed twice; remove one")
        return regularizers

    def factor(self, fraction: float) -> float:
        """Return the factor of `weight_schedule` at a consumed fraction of the budget; 1 without a schedule."""
        if self.weight_schedule is None:
            return 1.0
        (first, height), *_ = self.weight_schedule
        if fraction <= first:
            return height
        for (begin, low), (end, high) in pairwise(self.weight_schedule):
            if fraction <= end:
                return low + (high - low) * (fraction - begin) / (end - begin)
        return self.weight_schedule[-1][1]


class AuxiliaryConfig(RegularizedConfig):
    """Next-token loss plus `weight` times the auxiliary term, plus regularizers."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of the auxiliary term (lambda)."""

    @property
    def pairing_of_regularizers(self) -> Pairing | None:
        """Pairing of an objective in which only regularizers need pairs; None without regularizers."""
        return Pairing() if self.regularizers else None
