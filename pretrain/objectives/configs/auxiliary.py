"""The configuration of objectives with an auxiliary term: its weight, the schedule of the weight, and regularizers."""

from bisect import bisect_right
from itertools import pairwise
from typing import Any

from pydantic import Field, field_validator, model_validator

from data_prep.layout import Pairing
from pretrain.objectives.configs.base import ObjectiveConfig
from pretrain.objectives.configs.regularizers import AnyRegularizerConfig, RegularizerConfig

Points = list[tuple[float, float]]
"""Points (consumed fraction of the budget, value) of a piecewise linear function.

It is constant before the first point and after the last.
"""


def check_points(points: Points, value: str) -> None:
    """Raise ValueError if the fractions of the points do not increase between 0 and 1. `value` names their values."""
    fractions = [fraction for fraction, _ in points]
    if (
        not points
        or any(after <= before for before, after in pairwise(fractions))
        or not 0 <= fractions[0] <= fractions[-1] <= 1
    ):
        raise ValueError(f"must be points (fraction, {value}) with increasing fractions between 0 and 1")


def interpolate(points: Points, fraction: float) -> float:
    """Return the value at a consumed fraction of the budget."""
    (first, height), *_ = points
    if fraction <= first:
        return height
    for (begin, low), (end, high) in pairwise(points):
        if fraction <= end:
            return low + (high - low) * (fraction - begin) / (end - begin)
    return points[-1][1]


def _is_zero_after(points: Points, fraction: float) -> bool:
    """Return whether the value is 0 from a fraction up to the next point."""
    following = bisect_right([point for point, _ in points], fraction)
    return not any(value for _, value in points[max(following - 1, 0) : following + 1])


class RegularizedConfig(ObjectiveConfig):
    """Next-token loss plus terms whose weights may change during the run."""

    weight_schedule: Points | None = None
    """Schedule of a factor on the weights of all terms but `lm`: points (consumed fraction of the budget,
    factor) with linear interpolation. For example, [[0, 0], [0.1, 1]] is a warm-up. The factor is constant before the
    first point and after the last. Default: always 1."""
    active: tuple[float, float] | None = None
    """Part of the budget, as two consumed fractions, in which the terms other than `lm` are active. For example,
    [0, 0.25] switches them off after a quarter of the run. Outside of it their weights are 0, and the records carry no
    pairs. Default: always active."""
    regularizers: list[AnyRegularizerConfig] = []
    """Terms against collapse of the embeddings of pairs or, with `regularized`, of the ends of views; see below."""

    @field_validator("weight_schedule")
    @classmethod
    def _rising(cls, points: Points | None) -> Points | None:
        if points is None:
            return None
        check_points(points, "factor")
        if any(factor < 0 for _, factor in points) or not any(factor for _, factor in points):
            raise ValueError("factors must not be negative, and at least one must be above 0")
        return points

    @field_validator("active", mode="before")
    @classmethod
    def _window(cls, active: Any) -> Any:
        if active is None:
            return active
        if (
            not isinstance(active, list | tuple)
            or len(active) != 2
            or not all(isinstance(end, int | float) for end in active)
            or not 0 <= active[0] < active[1] <= 1
        ):
            raise ValueError("must be two increasing fractions between 0 and 1, such as [0, 0.25]")
        return active

    @field_validator("regularizers")
    @classmethod
    def _different(cls, regularizers: list[RegularizerConfig]) -> list[RegularizerConfig]:
        if len({regularizer.name for regularizer in regularizers}) < len(regularizers):
            raise ValueError("a regularizer is listed twice; remove one")
        return regularizers

    @model_validator(mode="after")
    def _check_active(self) -> "RegularizedConfig":
        if self.active is not None and self.weight_schedule is not None:
            begin, end = self.active
            changes = [begin, *(fraction for fraction, _ in self.weight_schedule if begin < fraction < end)]
            if all(self._is_off_after(fraction) for fraction in changes):
                raise ValueError(
                    f"active has no effect because weight_schedule is 0 from {begin:g} to {end:g}; change one of them"
                )
        return self

    @property
    def changes_during_run(self) -> bool:
        """Whether weights or the dropout depend on the consumed fraction of the budget."""
        return self.active is not None or self.weight_schedule is not None

    def factor(self, fraction: float) -> float:
        """Return the factor for the weights of all terms except `lm` when `fraction` of the budget is used.

        A step is in the part `active` if the fraction at its end is.
        """
        if self.active is not None:
            begin, end = self.active
            if not begin < min(fraction, 1.0) <= end:  # the last step may use more than the budget
                return 0.0
        return 1.0 if self.weight_schedule is None else interpolate(self.weight_schedule, fraction)

    def record_dropout(self, fraction: float) -> float:
        """Return the fraction of the records without pairs; 1 if the factor is 0 just after a consumed fraction.

        The records are chosen before the step is counted. A step in which the factor becomes 0 may therefore have
        pairs without weight, and a step in which it rises from 0 may lack pairs. With a budget in steps, the pairs and
        the weight agree if the fractions are multiples of a step.
        """
        return 1.0 if self._is_off_after(fraction) else self.loss_dropout(fraction)

    def _is_off_after(self, fraction: float) -> bool:
        """Return whether the factor is 0 just after a consumed fraction of the budget."""
        if self.active is not None and not self.active[0] <= fraction < self.active[1]:
            return True
        return self.weight_schedule is not None and _is_zero_after(self.weight_schedule, fraction)


class AuxiliaryConfig(RegularizedConfig):
    """Next-token loss plus `weight` times the auxiliary term, plus regularizers."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of the auxiliary term (lambda)."""

    @property
    def pairing_of_regularizers(self) -> Pairing | None:
        """Pairing of an objective in which only regularizers need pairs; None without regularizers."""
        return Pairing() if self.regularizers else None
