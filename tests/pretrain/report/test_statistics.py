"""Tests of the significance test over seeds: comparison with formulas, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, stats

from pretrain.report.statistics import (
    ALPHA,
    compare,
    compare_with_primary,
    confidence_interval,
    holm_correction,
    min_detectable_difference,
    p_value,
    sign_flip_p_value,
)

BASELINE = {1: 0.70, 2: 0.69, 3: 0.71, 4: 0.70, 5: 0.68}


def shifted(shifts):
    return {seed: value + shift for (seed, value), shift in zip(BASELINE.items(), shifts, strict=True)}


def test_a_single_arm_has_the_result_of_students_paired_t_test():
    arm = shifted([0.03, 0.05, 0.01, 0.02, 0.04])
    found = compare({"arm": arm}, BASELINE, higher_is_better=True)["arm"]
    expected = stats.ttest_rel(list(arm.values()), list(BASELINE.values()))
    bounds = expected.confidence_interval(0.95)
    assert (found.p, found.corrected_p) == (pytest.approx(expected.pvalue), pytest.approx(expected.pvalue))
    assert (found.low, found.high) == (pytest.approx(bounds.low), pytest.approx(bounds.high))
    sd = math.sqrt(sum((shift - 0.03) ** 2 for shift in (0.03, 0.05, 0.01, 0.02, 0.04)) / 4)
    assert found.mean == pytest.approx(0.03) and found.sd == pytest.approx(sd)
    t_quantile = 2.776445  # tabulated, for 4 degrees of freedom
    assert found.low == pytest.approx(0.03 - t_quantile * sd / math.sqrt(5), rel=1e-5)


@pytest.mark.parametrize(
    "sign, higher_is_better, verdict",
    [(1, True, "helps"), (1, False, "hurts"), (-1, True, "hurts"), (-1, False, "helps")],
)
def test_the_metric_decides_which_direction_is_better(sign, higher_is_better, verdict):
    arm = shifted([sign * shift for shift in (0.03, 0.031, 0.029, 0.03, 0.032)])
    assert compare({"arm": arm}, BASELINE, higher_is_better)["arm"].verdict == verdict


def test_pairing_finds_a_difference_that_the_spread_of_values_hides():
    baseline = {1: 0.1, 2: 0.5, 3: 0.9}
    arm = {1: 0.12, 2: 0.521, 3: 0.919}
    assert compare({"arm": arm}, baseline, True)["arm"].verdict == "helps"
    assert stats.ttest_ind(list(arm.values()), list(baseline.values())).pvalue > 0.9


def test_ties_noise_and_too_few_seeds_do_not_count_as_a_difference():
    found = compare(
        {
            "same": dict(BASELINE),
            "constant": {seed: value + 0.01 for seed, value in BASELINE.items()},
            "one seed": {1: 0.9},
            "other seeds": {7: 0.9, 8: 0.9},
            "noise": shifted([0.01, -0.01, 0.02, -0.02, 0.001]),
        },
        BASELINE,
        True,
    )
    assert (
        found["same"].verdict == "no difference found"
        and found["same"].mean == 0
        and "same values" in found["same"].reason
    )
    assert found["constant"].verdict == "no verdict" and "spread cannot be estimated" in found["constant"].reason
    assert found["one seed"].verdict == "no verdict" and found["one seed"].mean == pytest.approx(0.2)
    assert found["other seeds"].verdict == "no verdict" and found["other seeds"].mean is None
    assert found["noise"].verdict == "no difference found" and found["noise"].low < 0 < found["noise"].high
    assert found["noise"].corrected_p == found["noise"].p  # the only arm that could be tested


def test_rounding_in_fp32_is_not_a_spread():
    counts = {1: (900, 910), 2: (820, 830), 3: (850, 860)}
    baseline = {seed: float(np.float32(count / 1000)) for seed, (count, _) in counts.items()}
    arm = {seed: float(np.float32(count / 1000)) for seed, (_, count) in counts.items()}
    assert len({arm[seed] - baseline[seed] for seed in counts}) > 1
    found = compare({"arm": arm}, baseline, True)["arm"]
    assert found.verdict == "no verdict" and "the same in every seed" in found.reason
    nearly_equal_arm = {seed: value * (1 + 2e-7 * seed) for seed, value in baseline.items()}
    assert "same values in every seed" in compare({"arm": nearly_equal_arm}, baseline, True)["arm"].reason
    tiny_arm = {seed: value / 1e9 for seed, value in shifted([0.03, 0.05, 0.01, 0.02, 0.04]).items()}
    baseline = {seed: value / 1e9 for seed, value in BASELINE.items()}
    found = compare({"arm": tiny_arm, "diverged": dict.fromkeys(tiny_arm, 1e9)}, baseline, True)
    assert found["arm"].verdict == "helps", "the tolerance must not depend on other arms"


def test_differences_are_relative_to_the_size_of_the_metric():
    change = {1: 1e-8, 2: 1.1e-8, 3: 0.9e-8}
    zero = dict.fromkeys(change, 0.0)
    assert compare({"arm": change}, zero, True)["arm"].verdict == "helps"
    assert compare({"arm": change}, zero, True, sizes={"arm": 0.9})["arm"].p is None


def test_an_arm_with_a_value_that_is_not_finite_does_not_affect_the_other_arms():
    arms = {"good": shifted([0.03, 0.05, 0.01, 0.02, 0.04]), "noise": shifted([0.01, -0.01, 0.02, -0.02, 0.001])}
    without = compare(arms, BASELINE, True)
    for broken in (math.nan, math.inf):
        found = compare(arms | {"broken": dict(BASELINE) | {2: broken}}, BASELINE, True)
        assert {name: found[name] for name in arms} == without
        assert found["broken"].verdict == "no verdict" and found["broken"].p is None
        assert "the values of seed 2 are not finite" in found["broken"].reason


def step_down(p_values):
    """Return the names that Holm's step-down procedure rejects.

    It compares the smallest p-value with alpha / m, the next with alpha / (m - 1), and stops at the first failure.
    """
    rejected = set()
    for rank, name in enumerate(sorted(p_values, key=p_values.get)):
        if p_values[name] >= ALPHA / (len(p_values) - rank):
            break
        rejected.add(name)
    return rejected


def test_holm_agrees_with_the_step_down_procedure_and_the_intervals():
    random = np.random.default_rng(0)
    for arms in (1, 2, 3, 7):
        for _ in range(200):
            differences = {str(arm): random.normal(random.choice([0, 0.5, 2]), 1, 5) for arm in range(arms)}
            p_values = {name: p_value(values) for name, values in differences.items()}
            rejected = step_down(p_values)
            for name, (corrected, alpha) in holm_correction(p_values).items():
                low, high = confidence_interval(differences[name], alpha)
                excludes_zero = low > 0 or high < 0
                assert (corrected < ALPHA) == (name in rejected) == excludes_zero, (p_values, name)
                assert corrected >= p_values[name] and alpha <= ALPHA


def test_holm_on_a_worked_example():
    corrected = {
        name: value for name, (value, _) in holm_correction({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}).items()
    }
    assert corrected == {
        "d": pytest.approx(0.02),
        "a": pytest.approx(0.03),
        "c": pytest.approx(0.06),
        "b": pytest.approx(0.06),
    }


def test_without_an_effect_at_most_one_study_in_twenty_finds_one():
    random, studies = np.random.default_rng(1), 1000
    for arms in (1, 4):
        false_positives = 0
        for _ in range(studies):
            baseline = dict(enumerate(random.normal(0.7, 0.02, 4)))
            values = {
                str(arm): {seed: value + random.normal(0, 0.01) for seed, value in baseline.items()}
                for arm in range(arms)
            }
            false_positives += any(
                found.verdict != "no difference found" for found in compare(values, baseline, True).values()
            )
        assert false_positives / studies < 0.07, (arms, false_positives)
        if arms == 1:  # Holm's correction is conservative for several arms
            assert false_positives / studies > 0.03, false_positives


def test_the_other_arms_are_tested_only_if_the_primary_arm_differs():
    draw = np.random.default_rng(2)
    base = dict(enumerate(draw.normal(0.7, 0.01, 6)))

    def arm(gain):
        return {seed: value + gain + 0.001 * (seed % 3) for seed, value in base.items()}

    arms = {"equal": {seed: value + 0.01 * (-1) ** seed for seed, value in base.items()}, "better": arm(0.05)}
    found = compare_with_primary(arms, base, True, "equal")
    assert found["equal"].verdict == "no difference found" and found["better"].verdict == "no verdict"
    assert "only if the primary arm, equal, differs" in found["better"].reason and found["better"].low is None
    assert found["better"].mean == pytest.approx(compare(arms, base, True)["better"].mean)

    arms = {"first": arm(0.003), "other": arm(0.05), "third": arm(0.04)}
    found, alone = compare_with_primary(arms, base, True, "first"), compare({"first": arms["first"]}, base, True)
    others = compare({name: arms[name] for name in ("other", "third")}, base, True)
    assert found["first"] == alone["first"] and found["first"].arms == 1 and found["other"].arms == 2
    assert others["other"].corrected_p < found["first"].p < ALPHA
    assert (
        found["other"].corrected_p == found["third"].corrected_p == found["first"].p
    )  # no arm counts before the first
    assert (found["other"].low, found["other"].high) == (others["other"].low, others["other"].high)
    assert compare_with_primary(arms, base, True, None) == compare(arms, base, True)
    worse = compare_with_primary(arms, base, False, "first")  # a primary arm that hurts differs too
    assert worse["first"].verdict == worse["other"].verdict == "hurts"


def test_a_primary_arm_does_not_add_to_the_false_verdicts():
    random, studies, wrong = np.random.default_rng(4), 2000, 0
    for _ in range(studies):
        baseline = dict(enumerate(random.normal(0.7, 0.02, 6)))
        arms = {
            name: {seed: value + random.normal(0, 0.01) for seed, value in baseline.items()}
            for name in ("first", "second", "third")
        }
        found = compare_with_primary(arms, baseline, True, "first")
        wrong += any(test.verdict in ("helps", "hurts") for test in found.values())
    assert 0.03 < wrong / studies < 0.065, wrong


def test_a_test_of_all_signs_equals_its_enumeration():
    draw = np.random.default_rng(5)
    for count in (1, 2, 5, 8):
        differences = draw.normal(0.5, 1, count).tolist()
        means = [
            abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=count)
        ]
        expected = sum(mean >= abs(sum(differences)) - 1e-9 for mean in means) / len(means)
        assert sign_flip_p_value(differences) == pytest.approx(expected)
    assert sign_flip_p_value([1.0] * 6) == 2 / 64 and sign_flip_p_value([1.0] * 17) is None
    assert sign_flip_p_value([1.0] * 16) == 2 / 2**16


def test_the_detectable_difference_of_several_arms_uses_the_corrected_level():
    random = np.random.default_rng(3)
    baseline = dict(enumerate(random.normal(0.7, 0.02, 5)))
    arms = {str(arm): {seed: value + random.normal(0, 0.01) for seed, value in baseline.items()} for arm in range(4)}
    for name, found in compare(arms, baseline, True).items():
        assert found.min_detectable == pytest.approx(min_detectable_difference(found.sd, 5, ALPHA / 4)), name


@pytest.mark.parametrize("seeds, tests", itertools.product((2, 3, 5, 10), (1, 4)))
def test_the_detectable_difference_is_found_in_four_of_five_studies(seeds, tests):
    random, alpha = np.random.default_rng(2), ALPHA / tests
    differences = random.normal(min_detectable_difference(0.3, seeds, alpha), 0.3, (40_000, seeds))
    t_values = differences.mean(axis=1) / (differences.std(axis=1, ddof=1) / np.sqrt(seeds))
    assert np.mean(np.abs(t_values) > stats.t.ppf(1 - alpha / 2, seeds - 1)) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("seeds", [3, 6, 20])
def test_the_detectable_difference_has_a_power_of_80_percent(seeds):
    """Integrate the power over the density of the sample standard deviation."""
    bound, freedom = stats.t.ppf(0.975, seeds - 1), seeds - 1
    shift = min_detectable_difference(1.0, seeds, 0.05) * np.sqrt(seeds)

    def found(deviation):
        limit = bound * deviation
        density = stats.chi.pdf(deviation * np.sqrt(freedom), freedom) * np.sqrt(freedom)
        return density * (stats.norm.sf(limit - shift) + stats.norm.cdf(-limit - shift))

    power, _ = integrate.quad(found, 0, np.inf)
    assert power == pytest.approx(0.8, abs=1e-5)


def test_unpaired_seeds_do_not_change_the_tolerance_of_ties():
    arm, baseline = {0: 2.5, 1: 2.4, 2: 2.8}, {0: 3.0, 1: 3.1, 2: 3.2}
    expected = compare({"a": arm}, baseline, False)["a"]
    assert expected.verdict == "helps"
    assert (
        compare({"a": arm}, baseline | {3: 2.5e6}, False)["a"]
        == expected
        == compare({"a": arm | {4: 1e9}}, baseline, False)["a"]
    )


def test_a_difference_of_a_thousandth_of_the_metric_is_not_a_tie():
    baseline = {0: 0.9, 1: 0.85, 2: 0.88}
    arm = {seed: value + 0.0009 + 1e-5 * seed for seed, value in baseline.items()}
    assert compare({"a": arm}, baseline, True)["a"].verdict == "helps"
    same = {seed: value * (1 + 1e-8 * seed) for seed, value in baseline.items()}
    assert "same values in every seed" in compare({"a": same}, baseline, True)["a"].reason
