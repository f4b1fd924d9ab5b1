"""Speeds of arms relative to the baseline, from measurements in pairs."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class PairedRatio(NamedTuple):
    """Ratio of two quantities that were measured in pairs."""

    median: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether all pairs differ in the same direction: the interval from the lowest to the highest excludes 1."""
        return not self.low <= 1 <= self.high

    @property
    def used(self) -> float:
        """The median; 1 if the quantities count as equal."""
        return self.median if self.differs else 1.0

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.3f}"
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f}{'' if self.differs else ', equal'})"


EQUAL = PairedRatio(1.0, 1.0, 1.0)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> PairedRatio:
    """Return the ratio of two quantities; the values at the same position form a pair."""
    ratios = [one / other for one, other in zip(numerators, denominators, strict=True)]
    return PairedRatio(statistics.median(ratios), min(ratios), max(ratios))


def read_ratios(calibration: Mapping[str, Mapping[str, Any]], baseline: str) -> dict[str, PairedRatio]:
    """Return the measured speed of each arm relative to the baseline, from `calibration` in study.json.

    Earlier versions recorded one value for each arm, without rounds. It is a ratio without a spread.
    """
    ratios = {baseline: EQUAL}
    earlier_speed = calibration.get(baseline, {}).get("tokens_per_second")
    for name, entry in calibration.items():
        if name == baseline:
            continue
        if entry.get("baseline") == baseline:
            ratios[name] = PairedRatio(**entry["speed_ratio"])
        elif earlier_speed and "tokens_per_second" in entry:
            ratios[name] = paired_ratio([entry["tokens_per_second"]], [earlier_speed])
    return ratios


def mean_over_levels(levels: Mapping[float, float], lowest: float, highest: float) -> float:
    """Return the mean over a run of a quantity that is linear in the dropout of the records.

    `levels` maps each dropout to its fraction of the run; `lowest` and `highest` are the values of the quantity at the
    lowest and the highest dropout.
    """
    begin, end = min(levels), max(levels)
    part = sum(share * (level - begin) / (end - begin) for level, share in levels.items())
    return lowest + part * (highest - lowest)
