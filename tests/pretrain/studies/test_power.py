"""The number of seeds that follows from a pilot."""

import numpy as np
import pytest

from data_prep.utils.console import UserError
from pretrain.report.statistics import min_detectable_difference
from pretrain.studies.config import PilotConfig, load_study
from pretrain.studies.power import choose_seeds, describe

PILOT = PilotConfig(detect=0.02)


def values(spread, arms=1):
    """Return the metric of a baseline and of arms whose differences from it have this standard deviation."""
    base = {1: 0.5, 2: 0.53, 3: 0.48}
    arm = {seed: value + 0.2 + spread * (seed - 2) for seed, value in base.items()}
    return {"plain": base} | {f"arm{number}": arm for number in range(arms)}


@pytest.mark.parametrize("arms", [1, 4])
@pytest.mark.parametrize("spread", [0.01, 0.02, 0.03])
def test_the_number_is_the_smallest_with_enough_power(spread, arms):
    decision = choose_seeds(PILOT, "plain", values(spread, arms))
    number = len(decision["seeds"])
    detectable = [min_detectable_difference(spread, seeds, 0.05 / arms) for seeds in (number - 1, number)]
    assert decision["sd"] == pytest.approx({f"arm{index}": spread for index in range(arms)})
    if decision["limit_reached"]:
        assert (
            number == PILOT.most
            and detectable[1] > PILOT.detect
            and "find only a true difference" in describe(decision)
        )
    else:
        assert detectable[1] <= PILOT.detect < detectable[0] or number == 3
        assert f"{number} further seeds, 4 to {3 + number}, find a true difference of 0.02" in describe(decision)
    assert decision["seeds"] == list(range(4, 4 + number)) and decision["detectable"] == pytest.approx(detectable[1])


def test_the_arm_with_the_largest_spread_decides():
    narrow, wide = values(0.005), values(0.025)
    decision = choose_seeds(PILOT, "plain", narrow | {"wide": wide["arm0"]})
    assert decision["deciding"] == "wide" and len(decision["seeds"]) > len(choose_seeds(PILOT, "plain", wide)["seeds"])


def test_the_primary_arm_decides_alone_and_its_level_is_not_corrected():
    arms = values(0.02, 3) | {"wide": values(0.2)["arm0"]}
    decision = choose_seeds(PILOT, "plain", arms, "arm1")
    alone = choose_seeds(PILOT, "plain", values(0.02))
    assert decision["deciding"] == decision["primary"] == "arm1" and set(decision["sd"]) == set(arms) - {"plain"}
    assert (decision["seeds"], decision["detectable"]) == (alone["seeds"], alone["detectable"])
    assert describe(decision).startswith(
        "pilot: the standard deviation of the differences from the baseline is 0.02 (arm1)"
    )


def test_the_final_test_has_the_power_and_the_pilot_does_not_bias_it():
    """The true spread is known here, so the power is 80%; without an effect, one study in twenty finds one."""
    from scipy.stats import ttest_1samp

    number = len(choose_seeds(PILOT, "plain", values(0.025))["seeds"])
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 0.025, (number, 4000))
    assert np.mean(ttest_1samp(noise + 0.02, 0).pvalue < 0.05) == pytest.approx(0.82, abs=0.03)


def test_a_pilot_without_spread_is_an_error():
    with pytest.raises(UserError, match="the same in every seed; choose a metric that distinguishes runs"):
        choose_seeds(PILOT, "plain", values(0))


def test_seeds_are_a_list_or_a_pilot(make_study):
    listed, pilot = make_study(seeds=[4, 5]).config, make_study(seeds={"detect": 0.5}).config
    assert listed.seeds == [4, 5] and listed.power is None
    assert pilot.seeds == pilot.power.pilot == [1, 2, 3] and pilot.power.most == 20 and pilot.power.detect == 0.5
    again = type(pilot).model_validate(pilot.model_dump())
    assert again.seeds == [1, 2, 3] and again.power is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seeds": {}}, "seeds.detect: Field required"),
        ({"seeds": {"detect": 0}}, "seeds.detect: Input should be greater than 0"),
        ({"seeds": {"detect": 0.1, "pilto": [1, 2, 3]}}, "unknown key 'seeds.pilto'"),
        ({"seeds": {"detect": 0.1, "pilot": [1, 2]}}, "seeds.pilot: List should have at least 3 items"),
        ({"seeds": {"detect": 0.1, "pilot": [1, 2, 2]}}, "seeds lists a seed twice"),
        ({"seeds": {"detect": 0.1, "most": 2}}, "seeds.most: Input should be greater than or equal to 3"),
        ({"seeds": {"detect": 0.1}, "arms": {"plain": {}}}, "seeds.detect needs an arm other than the baseline"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"power": {"detect": 0.1}}, "unknown key 'power'"),
    ],
)
def test_errors_of_a_pilot_are_reported(write_study, changes, expected):
    with pytest.raises(UserError) as error:
        load_study(write_study(**changes), [])
    assert expected in str(error.value)
