"""Paired tests over seeds, corrected for several arms, and the differences that they can detect.

The test is Student's paired t-test. The seed determines the initial weights and the order of the records, so the
difference between an arm and the baseline with the same seed has less spread than their values. Holm's correction
(Scandinavian Journal of Statistics 6, 1979) is applied when several arms are compared with one baseline. A primary arm
is tested first, without a correction, and the other arms only if it differs from the baseline. So the probability that
an equal arm is called different is at most 5% for all arms together.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, norm, t

ALPHA = 0.05
"""Probability of calling at least one arm better or worse than the baseline although all arms are equal."""
POWER = 0.8
"""Probability of finding a difference of the smallest detectable size."""
EQUAL = 1e-6
"""Largest difference between two values that count as equal, as a fraction of the metric's magnitude.

Rates in older results are means in fp32, so 0.91 - 0.90 differs from 0.86 - 0.85 by 1e-7.
"""
MOST_FLIPPED = 16
"""Most differences of which all changes of signs are enumerated."""
QUANTILES = 10_000
"""Number of quantiles of the sample standard deviation in the sum that approximates the power of a test."""
Verdict = Literal["helps", "hurts", "no difference found", "no verdict"]


@dataclass(frozen=True)
class PairedTest:
    """Test of an arm against the baseline, over the seeds that both arms have."""

    seeds: list[int]
    mean: float | None
    """Mean difference, arm minus baseline, over the seeds; None if the arms share no seed."""
    verdict: Verdict
    sd: float | None = None
    p: float | None = None
    """Two-sided p value of this arm alone."""
    corrected_p: float | None = None
    """p value with Holm's correction for all arms that were tested."""
    level: float | None = None
    """Confidence level of the interval: 95% after the correction."""
    low: float | None = None
    high: float | None = None
    min_detectable: float | None = None
    """Smallest true difference that the test finds with 80% power, given its seeds, arms and spread."""
    arms: int = 1
    """Number of arms that were tested together; p and interval are corrected for it."""
    reason: str = ""
    """Reason why the arm was not tested; empty if it was tested."""


def compare(
    arms: dict[str, dict[int, float]],
    baseline: dict[int, float],
    higher_is_better: bool,
    sizes: Mapping[str, float] | None = None,
) -> dict[str, PairedTest]:
    """Test each arm against the baseline; `arms` and `baseline` hold values of the metric by seed.

    An arm with a single seed, equal differences, or values that are not finite is not tested and has no corrected p.
    `sizes` maps each arm to the magnitude of the metric. It is needed if the values are changes of the metric. The
    default is the largest magnitude of the values.
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
    no_tests = {name: _untested(differences, baseline, EQUAL * sizes[name]) for name, differences in pairs.items()}
    results = {name: result for name, result in no_tests.items() if result is not None}
    tested = {name: np.array(list(differences.values())) for name, differences in pairs.items() if name not in results}
    p_values = {name: p_value(differences) for name, differences in tested.items()}
    for name, (corrected_p, alpha) in holm_correction(p_values).items():
        differences = tested[name]
        low, high = confidence_interval(differences, alpha)
        results[name] = PairedTest(
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
            len(tested),
        )
    return {name: results[name] for name in arms}


def compare_with_primary(
    arms: dict[str, dict[int, float]],
    baseline: dict[int, float],
    higher_is_better: bool,
    primary: str | None,
    sizes: Mapping[str, float] | None = None,
) -> dict[str, PairedTest]:
    """Test each arm against the baseline, the primary arm first; see `compare`.

    If the primary arm does not differ from the baseline, the other arms are not tested.
    """
    if primary not in arms:
        return compare(arms, baseline, higher_is_better, sizes)
    tests = compare({primary: arms[primary]}, baseline, higher_is_better, sizes)
    others = {name: values for name, values in arms.items() if name != primary}
    first = tests[primary]
    if first.verdict not in ("helps", "hurts"):
        reason = f"it is tested only if the primary arm, {primary}, differs from the baseline, which was not found"
        return tests | untested(others, baseline, reason)
    for name, test in compare(others, baseline, higher_is_better, sizes).items():
        if test.corrected_p is not None and first.corrected_p is not None:
            test = replace(test, corrected_p=max(test.corrected_p, first.corrected_p))
        tests[name] = test
    return tests


def sign_flip_p_value(differences: Sequence[float]) -> float | None:
    """Return the two-sided p value of a test that assumes only that the differences are symmetric around 0.

    It is the fraction of the 2^n changes of their signs with a mean at least as far from 0 (Fisher, The Design of
    Experiments, 1935, section 21). Returns None for more than MOST_FLIPPED differences.
    """
    if len(differences) > MOST_FLIPPED:
        return None
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    observed = abs(sum(differences))
    return float(np.mean(np.abs(sums) >= observed * (1 - EQUAL)))


def untested(arms: dict[str, dict[int, float]], baseline: dict[int, float], reason: str) -> dict[str, PairedTest]:
    """Return for each arm the mean difference from the baseline, with the reason why there is no test."""
    results = {}
    for name, values in arms.items():
        seeds = sorted(values.keys() & baseline.keys())
        mean = float(np.mean([values[seed] - baseline[seed] for seed in seeds])) if seeds else None
        results[name] = PairedTest(seeds, mean, "no verdict", reason=reason)
    return results


def max_magnitude(values: Iterable[float]) -> float:
    """Return the largest magnitude of the finite values; 0 if there are none."""
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def _untested(differences: dict[int, float], baseline: dict[int, float], tolerance: float) -> PairedTest | None:
    """Return the result for an arm that cannot be tested; None if it can be tested.

    Values that differ by at most `tolerance` count as equal.
    """
    seeds, values = list(differences), np.array(list(differences.values()))
    if not seeds:
        return PairedTest(seeds, None, "no verdict", reason="no seed has a value in both arms")
    if infinite := [seed for seed, difference in differences.items() if not math.isfinite(difference)]:
        return PairedTest(
            seeds, None, "no verdict", reason=f"the values of {format_seeds(infinite)} are not finite in both arms"
        )
    mean = float(values.mean())
    if len(seeds) == 1:
        return PairedTest(seeds, mean, "no verdict", reason="one seed does not show the spread between seeds")
    all_equal = bool((abs(values) <= tolerance).all())
    if all_equal and np.ptp(list(baseline.values())) <= tolerance:
        return PairedTest(
            seeds,
            0.0,
            "no verdict",
            reason=f"all runs have the same value, {baseline[seeds[0]]:g} (for example, no answer is right yet, or "
            "every answer is), so this metric cannot distinguish them, but a different metric may (--metric)",
        )
    if all_equal:
        return PairedTest(seeds, 0.0, "no difference found", 0.0, reason="both arms have the same values in every seed")
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
    """Format seeds as `seed 1` or `seeds 1, 2`."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _verdict(mean: float, corrected_p: float, higher_is_better: bool) -> Verdict:
    if corrected_p >= ALPHA:
        return "no difference found"
    return "helps" if (mean > 0) == higher_is_better else "hurts"


def p_value(differences: np.ndarray) -> float:
    """Return the two-sided p value of the t-test that the mean of the differences (n,) is 0."""
    return float(2 * t.sf(abs(differences.mean()) / _standard_error(differences), len(differences) - 1))


def confidence_interval(differences: np.ndarray, alpha: float) -> tuple[float, float]:
    """Return the confidence interval of the mean of the differences (n,) at level 1 - alpha."""
    half_width = t.ppf(1 - alpha / 2, len(differences) - 1) * _standard_error(differences)
    return float(differences.mean() - half_width), float(differences.mean() + half_width)


def _standard_error(differences: np.ndarray) -> float:
    return float(differences.std(ddof=1) / np.sqrt(len(differences)))


def holm_correction(p_values: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Return the corrected value of each p, and the alpha of the confidence interval of the same arm.

    The corrected p is below ALPHA if and only if Holm's step-down procedure rejects. The interval at level 1 - alpha
    excludes 0 in the same cases: the procedure stops at the first p that it does not reject, and all larger p use the
    alpha of that p.
    """
    result: dict[str, tuple[float, float]] = {}
    ordered = sorted(p_values, key=p_values.__getitem__)
    largest = 0.0
    factor = len(ordered)
    for rank, name in enumerate(ordered):
        if largest < ALPHA:
            factor = len(ordered) - rank
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        result[name] = (largest, ALPHA / factor)
    return result


def min_detectable_difference(sd: float, seeds: int, alpha: float) -> float:
    """Return the true difference that a two-sided paired t-test at `alpha` finds with a probability of 80%.

    `sd` is the standard deviation of the differences.
    """
    return _detectable_effect(seeds, alpha) * sd


@lru_cache
def _detectable_effect(seeds: int, alpha: float) -> float:
    """Return the smallest detectable difference, in standard deviations of the differences."""
    bound = t.ppf(1 - alpha / 2, seeds - 1)
    quantiles = (np.arange(QUANTILES) + 0.5) / QUANTILES
    # Integrate over the distribution of the sample standard deviation, because scipy's nct is NaN for few seeds.
    thresholds = bound * np.sqrt(chi2.ppf(quantiles, seeds - 1) / (seeds - 1))

    def power_minus_target(shift: float) -> float:
        return float(np.mean(norm.sf(thresholds - shift) + norm.cdf(-thresholds - shift))) - POWER

    high = bound
    while power_minus_target(high) < 0:
        high *= 2
    return float(brentq(power_minus_target, 0, high) / np.sqrt(seeds))
