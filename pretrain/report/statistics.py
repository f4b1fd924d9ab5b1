"""Paired tests over seeds, corrected for several arms, and what they could have seen.

Student's paired t-test: an arm and the baseline share a seed, which decides the initial weights and the order of the records, so their
difference has less spread than their values. Holm's correction (Scandinavian Journal of Statistics 6, 1979) for several arms against one
baseline.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, norm, t

ALPHA = 0.05
"""Chance of calling any arm better or worse than the baseline, where none is."""
POWER = 0.8
EQUAL = 1e-6
"""Largest difference of two values that are called equal, as a fraction of the metric's size. Rates were once means in fp32, which
makes 0.91 - 0.90 differ from 0.86 - 0.85 by 1e-7."""
QUANTILES = 10_000
"""Of the standard deviation of a sample, in the sum that gives the power of a test."""
Verdict = Literal["helps", "hurts", "no difference found", "no verdict"]


@dataclass(frozen=True)
class PairedTest:
    """An arm against the baseline, over the seeds that both have."""

    seeds: list[int]
    mean: float | None
    """Of the differences, arm minus baseline, one a seed; None without a seed in common."""
    verdict: Verdict
    sd: float | None = None
    p: float | None = None
    """Two-sided, of this arm alone."""
    corrected_p: float | None = None
    """By Holm, for all arms that were tested."""
    level: float | None = None
    """Confidence level of the interval: 95% after the correction."""
    low: float | None = None
    high: float | None = None
    min_detectable: float | None = None
    """The smallest true difference that a test of this many seeds, differences of this spread and this many arms finds with 80% power."""
    reason: str = ""
    """Why there is no verdict."""


def compare(
    arms: dict[str, dict[int, float]],
    baseline: dict[int, float],
    higher_is_better: bool,
    sizes: Mapping[str, float] | None = None,
) -> dict[str, PairedTest]:
    """Test each arm against the baseline; all are values of the metric by seed.

    An arm is not tested, and gets no corrected p, if its differences cannot be: for one seed, equal differences or values that are not
    finite. `sizes` are the magnitudes of the metric by arm where the values are changes of it; by default the largest of the values.
    """
    pairs = {
        name: {seed: values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())}
        for name, values in arms.items()
    }
    if sizes is None:
        sizes = {
            name: max_magnitude(value for seed in pairs[name] for value in (values[seed], baseline[seed]))
            for name, values in arms.items()
        }
    untested = {name: _untested(differences, baseline, EQUAL * sizes[name]) for name, differences in pairs.items()}
    found = {name: result for name, result in untested.items() if result is not None}
    tested = {name: np.array(list(differences.values())) for name, differences in pairs.items() if name not in found}
    p_values = {name: p_value(differences) for name, differences in tested.items()}
    for name, (corrected_p, alpha) in holm_correction(p_values).items():
        differences = tested[name]
        low, high = confidence_interval(differences, alpha)
        found[name] = PairedTest(
            list(pairs[name]),
            float(differences.mean()),
            _verdict(differences.mean(), corrected_p, higher_is_better),
            float(differences.std(ddof=1)),
            p_values[name],
            corrected_p,
            1 - alpha,
            low,
            high,
            min_detectable_difference(float(differences.std(ddof=1)), len(differences), ALPHA / len(tested)),
        )
    return {name: found[name] for name in arms}


def max_magnitude(values: Iterable[float]) -> float:
    """Return the largest magnitude among the finite values; 0 without any."""
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def _untested(differences: dict[int, float], baseline: dict[int, float], tolerance: float) -> PairedTest | None:
    """Return what can be said where no test is possible, or None. Values up to `tolerance` apart count as equal."""
    seeds, values = list(differences), np.array(list(differences.values()))
    if not seeds:
        return PairedTest(seeds, None, "no verdict", reason="no seed has a value of both")
    if infinite := [seed for seed, difference in differences.items() if not math.isfinite(difference)]:
        return PairedTest(
            seeds, None, "no verdict", reason=f"the values of {format_seeds(infinite)} are not finite numbers in both"
        )
    mean = float(values.mean())
    if len(seeds) == 1:
        return PairedTest(seeds, mean, "no verdict", reason="one seed tells nothing about the spread between seeds")
    same = bool((abs(values) <= tolerance).all())
    if same and np.ptp(list(baseline.values())) <= tolerance:
        return PairedTest(
            seeds,
            0.0,
            "no verdict",
            reason=f"all runs have the same value, {baseline[seeds[0]]:g}, as where no answer is right yet, or "
            "every one: this metric cannot tell them apart, another one may (--metric)",
        )
    if same:
        return PairedTest(seeds, 0.0, "no difference found", 0.0, reason="both have the same values in every seed")
    if np.ptp(values) <= tolerance:
        return PairedTest(
            seeds,
            mean,
            "no verdict",
            0.0,
            reason="the difference is the same in every seed, so its spread cannot be estimated",
        )
    return None


def format_seeds(seeds: list[int]) -> str:
    """Return `seed 1`, or `seeds 1, 2`."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _verdict(mean: float, corrected_p: float, higher_is_better: bool) -> Verdict:
    if corrected_p >= ALPHA:
        return "no difference found"
    return "helps" if (mean > 0) == higher_is_better else "hurts"


def p_value(differences: np.ndarray) -> float:
    """Two-sided p of the t-test that the mean of the differences (n,) is 0."""
    return float(2 * t.sf(abs(differences.mean()) / _standard_error(differences), len(differences) - 1))


def confidence_interval(differences: np.ndarray, alpha: float) -> tuple[float, float]:
    """The confidence interval of the mean of differences (n,) at level 1 - alpha."""
    half = t.ppf(1 - alpha / 2, len(differences) - 1) * _standard_error(differences)
    return float(differences.mean() - half), float(differences.mean() + half)


def _standard_error(differences: np.ndarray) -> float:
    return float(differences.std(ddof=1) / np.sqrt(len(differences)))


def holm_correction(p_values: dict[str, float]) -> dict[str, tuple[float, float]]:
    """For each p its corrected value, and the alpha that its own interval takes.

    The corrected p is below ALPHA where Holm's step-down procedure rejects, and then, and only then, the interval at level 1 - alpha leaves
    out 0: the first p that is not rejected stops the procedure, and all above it are measured by its alpha.
    """
    result: dict[str, tuple[float, float]] = {}
    ordered = sorted(p_values, key=p_values.__getitem__)
    largest, factor = 0.0, len(ordered)
    for rank, name in enumerate(ordered):
        if largest < ALPHA:
            factor = len(ordered) - rank
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        result[name] = (largest, ALPHA / factor)
    return result


def min_detectable_difference(sd: float, seeds: int, alpha: float) -> float:
    """The true difference that a two-sided paired t-test at `alpha` finds with a chance of 80%, for differences of this standard deviation."""
    return _detectable_effect(seeds, alpha) * sd


@lru_cache
def _detectable_effect(seeds: int, alpha: float) -> float:
    """The same in standard deviations."""
    bound, quantiles = t.ppf(1 - alpha / 2, seeds - 1), (np.arange(QUANTILES) + 0.5) / QUANTILES
    seen = bound * np.sqrt(
        chi2.ppf(quantiles, seeds - 1) / (seeds - 1)
    )  # over the sd that a sample may show; scipy's nct is NaN for few seeds

    def missing(shift: float) -> float:
        return float(np.mean(norm.sf(seen - shift) + norm.cdf(-seen - shift))) - POWER

    high = bound
    while missing(high) < 0:
        high *= 2
    return float(brentq(missing, 0, high) / np.sqrt(seeds))
