"""Sensitivity of each arm to the tuned keys: the width of the range of good values, and the spread in it."""

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
    values: list[float]
    """Values of the key that are numbers, in increasing order."""
    means: list[float]
    """Mean score over the seeds at each value."""
    scores: list[list[float]]
    """Scores of all seeds at each value."""
    higher_is_better: bool
    at_edge: bool
    """Whether the best value is at the edge of the range."""

    @property
    def best(self) -> float:
        """Value with the best mean score."""
        return self.values[self.means.index(self._best_mean)]

    @property
    def _best_mean(self) -> float:
        return max(self.means) if self.higher_is_better else min(self.means)

    @property
    def tolerance(self) -> float:
        """Largest distance from the best score at which a value counts as good; see WITHIN."""
        return WITHIN * max(1.0, abs(self._best_mean))

    @property
    def good(self) -> list[int]:
        """Indices of the values around the best one whose mean scores are all within `tolerance` of it."""
        close = [abs(mean - self._best_mean) <= self.tolerance for mean in self.means]
        first = last = self.means.index(self._best_mean)
        while first and close[first - 1]:
            first -= 1
        while last + 1 < len(close) and close[last + 1]:
            last += 1
        return list(range(first, last + 1))

    @property
    def width(self) -> float:
        """Ratio of the largest and the smallest good value; 1 if only the best value is good."""
        low, *_, high = [self.values[index] for index in (*self.good, self.good[-1])]
        return high / low if low > 0 else float("nan")

    @property
    def spread(self) -> float | None:
        """Standard deviation of all scores at good values; None for a single score."""
        scores = [score for index in self.good for score in self.scores[index]]
        return statistics.stdev(scores) if len(scores) > 1 else None


def sensitivity(comparison: Comparison) -> dict[str, list[KeyScores]]:
    """Return the scores of each arm along each tuned key whose values are numbers; empty without a tuning."""
    found: dict[str, list[KeyScores]] = {}
    tune = comparison.tune or {}
    for arm, trials in tune.get("trials", {}).items():
        for key in dict.fromkeys(key for trial in trials for key in trial["values"]):
            scores = _along(arm, key, trials, tune, comparison.metric.higher_is_better)
            if scores is not None:
                found.setdefault(key, []).append(scores)
    return found


def _along(
    arm: str, key: str, trials: Sequence[dict[str, Any]], tune: dict[str, Any], higher_is_better: bool
) -> KeyScores | None:
    best = tune["best"][arm]
    kept = [
        trial
        for trial in trials
        if trial["scores"] and all(trial["values"][other] == best[other] for other in best if other != key)
    ]
    numbers = [trial["values"][key] for trial in kept]
    if len(kept) < 2 or any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        return None
    kept.sort(key=lambda trial: float(trial["values"][key]))
    scores = [list(trial["scores"].values()) for trial in kept]
    return KeyScores(
        arm,
        key,
        [float(trial["values"][key]) for trial in kept],
        [statistics.fmean(values) for values in scores],
        scores,
        higher_is_better,
        key in tune["at_edge"][arm],
    )
