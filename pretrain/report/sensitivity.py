"""Sensitivity of each arm to the tuned keys: the width of the range of good values, and the spread in it."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.report.arms import Comparison

WITHIN = 0.02
"""Largest distance from the best score of an arm at which a value counts as good. If the best score is above 1, as a
loss or a percentage may be, it is this fraction of the best score."""


@dataclass(frozen=True)
class KeyScores:
    """Scores of an arm along one key, with the best values of all other keys."""

    arm: str
    key: str
    values: list[float] | list[str]
    """Values of the key: numbers in increasing order, or texts in the order of the trials."""
    means: list[float]
    """Mean score over the seeds at each value."""
    scores: list[list[float]]
    """Scores of all seeds at each value."""
    higher_is_better: bool
    at_edge: bool
    """Whether the best value is at the edge of the range."""

    @property
    def best(self) -> float | str:
        """Value with the best mean score."""
        return self.values[self.means.index(self.best_mean)]

    @property
    def best_mean(self) -> float:
        """Best mean score over the seeds."""
        return max(self.means) if self.higher_is_better else min(self.means)

    @property
    def tolerance(self) -> float:
        """Largest distance from the best score at which a value counts as good; see WITHIN."""
        return WITHIN * max(1.0, abs(self.best_mean))

    @property
    def has_numbers(self) -> bool:
        """Whether the values are numbers."""
        return not isinstance(self.values[0], str)

    @property
    def good(self) -> list[int]:
        """Indices of the values whose mean scores are within `tolerance` of the best score.

        Numbers form a range around the best one, without values beyond one that is not good.
        """
        close = [abs(mean - self.best_mean) <= self.tolerance for mean in self.means]
        if not self.has_numbers:
            return [index for index, is_close in enumerate(close) if is_close]
        first = last = self.means.index(self.best_mean)
        while first and close[first - 1]:
            first -= 1
        while last + 1 < len(close) and close[last + 1]:
            last += 1
        return list(range(first, last + 1))

    @property
    def width(self) -> float | None:
        """Ratio of the largest and the smallest good value; None for texts, and if the smallest is not above 0."""
        low, high = self.values[self.good[0]], self.values[self.good[-1]]
        if isinstance(low, str) or isinstance(high, str) or low <= 0:
            return None
        return high / low

    @property
    def spread(self) -> float | None:
        """Standard deviation of all scores at good values; None for a single score."""
        scores = [score for index in self.good for score in self.scores[index]]
        return statistics.stdev(scores) if len(scores) > 1 else None


def sensitivity(comparison: Comparison) -> dict[str, list[KeyScores]]:
    """Return the scores of each arm along each tuned key; empty without a tuning."""
    tune = comparison.tune or {}
    trials: dict[str, list[dict[str, Any]]] = tune.get("trials", {})
    found: dict[str, list[KeyScores]] = {}
    for key in dict.fromkeys(key for of_arm in trials.values() for trial in of_arm for key in trial["values"]):
        tried = [trial["values"][key] for of_arm in trials.values() for trial in of_arm if key in trial["values"]]
        as_value = float if all(map(is_number, tried)) else str
        for arm, of_arm in trials.items():
            along = _along(key, of_arm, tune["best"][arm])
            if len(along) < 2:
                continue
            pairs = [(as_value(trial["values"][key]), list(trial["scores"].values())) for trial in along]
            if as_value is float:
                pairs.sort(key=lambda pair: pair[0])
            values, scores = map(list, zip(*pairs, strict=True))
            means = [statistics.fmean(of_value) for of_value in scores]
            better, at_edge = comparison.metric.higher_is_better, key in tune["at_edge"][arm]
            found.setdefault(key, []).append(KeyScores(arm, key, values, means, scores, better, at_edge))
    return found


def is_number(value: Any) -> bool:
    """Return whether a value of a key is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _along(key: str, trials: Sequence[dict[str, Any]], best: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the trials with finite scores that have a value of `key`, and the best values of all other keys."""
    return [
        trial
        for trial in trials
        if trial["scores"]
        and all(map(math.isfinite, trial["scores"].values()))
        and key in trial["values"]
        and all(trial["values"][other] == best[other] for other in best if other != key)
    ]
