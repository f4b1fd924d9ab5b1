"""Power: the number of seeds that follows from the spread in a pilot and the difference worth finding.

The pilot's seeds run first, in all arms. The number of further seeds is the smallest with which the final test finds a
true difference of `detect` with a probability of 80%, given the standard deviation of the paired differences of the
primary arm or, without one, the largest standard deviation of an arm. The further seeds are the integers after the
largest seed of the pilot. Only they are part of the final test: a test that includes a pilot of three seeds calls up to
9% of equal arms different, because the study is short if the spread of the pilot happens to be small (docs/studies.md).
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.utils.console import UserError
from pretrain.report.runs import read_run
from pretrain.report.statistics import ALPHA, EQUAL, POWER, max_magnitude, min_detectable_difference
from pretrain.studies.config import FEWEST_SEEDS, PilotConfig, Study
from pretrain.studies.record import Run, StudyRecord
from pretrain.studies.runner import is_done

logger = logging.getLogger(__name__)


def use_decision(study: Study, record: StudyRecord) -> bool:
    """Add the further seeds to a study if study.json has them, and return whether it has them.

    A change of the pilot, of `detect` or `most`, or of the arms cancels an earlier decision. If the study file lists
    the seeds instead, the decision is kept for the report.
    """
    power, decided = study.config.power, record.power or {}
    if power is None:
        record.power = record.power if "seeds" in decided else None
        return False
    settings = _settings(power, list(study.config.arms), study.config.primary)
    if "seeds" not in decided or any(decided.get(key) != value for key, value in settings.items()):
        record.power = settings
        return False
    study.config.seeds = [*power.pilot, *decided["seeds"]]
    return True


def decide(study: Study, runs: Sequence[Run], record: StudyRecord) -> bool:
    """Choose the number of seeds if all runs of the pilot are done, and return whether that is so.

    `runs` are the runs of the pilot. Raises UserError if they do not show the spread of the metric.
    """
    power = study.config.power
    if power is None or not all(map(is_done, runs)):
        return False
    record.power = choose_seeds(power, study.config.baseline, pilot_values(study, runs), study.config.primary)
    use_decision(study, record)
    record.save()
    logger.info(describe(record.power))
    return True


def pilot_values(study: Study, runs: Sequence[Run]) -> dict[str, dict[int, float]]:
    """Return the metric of each arm by seed. Raises UserError if a run has no finite value."""
    metric = study.metric
    finished = [(run, read_run(run.folder)) for run in runs]
    settings = metric.common_settings([contents for _, contents in finished])
    values: dict[str, dict[int, float]] = {}
    for run, contents in finished:
        value = metric.final(contents, settings)
        if value is None or not math.isfinite(value):
            raise UserError(
                f"the number of seeds cannot follow from the pilot, because {metric} of {run.name} is {value}; "
                "change seeds.pilot or the arm, or list the seeds"
            )
        values.setdefault(run.arm, {})[run.seed] = value
    return values


def _settings(power: PilotConfig, arms: list[str], primary: str | None) -> dict[str, Any]:
    """Return the settings that a decision depends on."""
    return power.model_dump() | {"arms": arms} | ({"primary": primary} if primary else {})


def choose_seeds(
    power: PilotConfig, baseline: str, values: dict[str, dict[int, float]], primary: str | None = None
) -> dict[str, Any]:
    """Return the decision for study.json; `values` is the metric by arm and seed.

    With a primary arm, the number of seeds follows from its differences alone, and the level of its test is not
    corrected for the other arms. Raises UserError if the differences from the baseline have no spread.
    """
    base = values[baseline]
    sd = {
        arm: float(np.std([by_seed[seed] - base[seed] for seed in power.pilot], ddof=1))
        for arm, by_seed in values.items()
        if arm != baseline
    }
    deciding = primary or max(sd, key=sd.__getitem__)
    level = ALPHA if primary else ALPHA / len(sd)
    if sd[deciding] <= EQUAL * max_magnitude(value for by_seed in values.values() for value in by_seed.values()):
        raise UserError(
            "the number of seeds cannot follow from the pilot, because the differences between an arm and the baseline "
            "are the same in every seed; choose a metric that distinguishes runs, or list the seeds"
        )
    detectable = {
        number: min_detectable_difference(sd[deciding], number, level) for number in range(FEWEST_SEEDS, power.most + 1)
    }
    enough = next((number for number, difference in detectable.items() if difference <= power.detect), None)
    first, number = max(power.pilot) + 1, enough or power.most
    return _settings(power, list(values), primary) | {
        "sd": sd,
        "deciding": deciding,
        "seeds": list(range(first, first + number)),
        "limit_reached": enough is None,
        "detectable": detectable[number],
    }


def describe(decision: dict[str, Any]) -> str:
    """Return a decision as message text."""
    number, deciding = len(decision["seeds"]), decision["deciding"]
    which = "the standard deviation" if "primary" in decision else "the largest standard deviation"
    spread = (
        f"pilot: {which} of the differences from the baseline is {decision['sd'][deciding]:.4g} "
        f"({deciding}); {number} further seeds, {decision['seeds'][0]} to {decision['seeds'][-1]},"
    )
    if decision["limit_reached"]:
        return (
            f"{spread} are the most that seeds.most allows, but find only a true difference of "
            f"{decision['detectable']:.4g} with a probability of {POWER:.0%}, not {decision['detect']:g}"
        )
    return f"{spread} find a true difference of {decision['detect']:g} with a probability of {POWER:.0%}"
