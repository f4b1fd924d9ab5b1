"""Health of the training: clipped steps, gradients and activations of the layers, and the scale of the logits."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pretrain.report.curves import Band
from pretrain.report.runs import Run
from pretrain.report.summary import Spread, Summaries, spread
from pretrain.run_folder import LAYERS

CLIPPED, LOGITS, LOG_Z = "optimizer/clipped_fraction", "logits/rms", "logits/log_z"
GRADIENTS, ACTIVATIONS = f"{LAYERS}gradient_norm", f"{LAYERS}activation_rms"
LATE = 0.5
"""Last fraction of the steps, over which the measurements of a run are averaged."""


@dataclass(frozen=True)
class Health:
    """The measures in which arms differ: the seeds of two arms do not overlap."""

    rows: dict[str, dict[str, Spread | None]]
    """Name of a measure -> arm -> its spread over the seeds."""
    profiles: dict[str, dict[str, Band]]
    """Metric tag of a measure of the layers -> arm -> the measure by number of the layer."""
    tags: list[str]
    """Metric tags of the measures that are curves."""


def health(summaries: Summaries) -> Health | None:
    """Compare the health of the finished runs; return None if there is one arm only, or if nothing was recorded."""
    measures: dict[str, Callable[[Run], float | None]] = {
        "fraction of clipped steps": clipped_fraction,
        "largest gradient norm of a layer": lambda run: max(_late_layers(run, GRADIENTS).values(), default=None),
        "largest activation RMS of a layer": lambda run: max(_late_layers(run, ACTIVATIONS).values(), default=None),
        "logit RMS": lambda run: _late_mean(run.curve(LOGITS)),
        "log Z": lambda run: _late_mean(run.curve(LOG_Z)),
    }
    recorded = {
        name: {arm: spread(map(measure, summary.finished)) for arm, summary in summaries.arms.items()}
        for name, measure in measures.items()
    }
    if len(summaries.arms) < 2 or not any(any(by_arm.values()) for by_arm in recorded.values()):
        return None
    rows = {name: by_arm for name, by_arm in recorded.items() if _differ(by_arm.values())}
    profiles = {tag: _profiles(summaries, tag) for tag in (GRADIENTS, ACTIVATIONS)}
    names = {"logit RMS": LOGITS, "log Z": LOG_Z, "fraction of clipped steps": CLIPPED}
    return Health(
        rows,
        {tag: by_arm for tag, by_arm in profiles.items() if _profiles_differ(by_arm)},
        [tag for name, tag in names.items() if name in rows],
    )


def clipped_fraction(run: Run) -> float | None:
    """Return the fraction of clipped steps of a run: a mean over its intervals, weighted by their numbers of steps."""
    if not (curve := run.curve(CLIPPED)):
        return None
    steps, fractions = zip(*curve, strict=True)
    lineage = run.environment.get("lineage") or [{"step": 0}]  # a branch counts from the step of its source on
    return float(np.average(fractions, weights=np.diff([lineage[-1]["step"], *steps])))


def _late(run_steps: list[int]) -> int:
    """Return the index of the first measurement to average."""
    return next(index for index, step in enumerate(run_steps) if step > (1 - LATE) * run_steps[-1])


def _late_mean(curve: list[tuple[int, float]]) -> float | None:
    if not curve:
        return None
    first = _late([step for step, _ in curve])
    return float(np.mean([value for _, value in curve[first:]]))


def _late_layers(run: Run, tag: str) -> dict[int, float]:
    """Return the mean of a measure of the layers by number of the layer."""
    parts = run.layer_curves(tag)
    means = {int(part): _late_mean(curve) for part, curve in parts.items() if part.isdigit()}
    return {number: mean for number, mean in sorted(means.items()) if mean is not None}


def _profiles(summaries: Summaries, tag: str) -> dict[str, Band]:
    """Return the measure by number of the layer for each arm that has it, over the layers that all seeds have."""
    bands = {}
    for name, summary in summaries.arms.items():
        seeds = [layers for run in summary.finished if (layers := _late_layers(run, tag))]
        if seeds:
            numbers = [number for number in seeds[0] if all(number in layers for layers in seeds)]
            values = np.array([[layers[number] for number in numbers] for layers in seeds])
            bands[name] = Band(np.array(numbers), values.mean(axis=0), values.min(axis=0), values.max(axis=0))
    return bands


def _profiles_differ(bands: Mapping[str, Band]) -> bool:
    """Return whether two arms differ in a layer that both have, or have different numbers of layers."""
    for one, other in itertools.combinations(bands.values(), 2):
        if not np.array_equal(one.x, other.x) or ((one.low > other.high) | (other.low > one.high)).any():
            return True
    return False


def _differ(spreads: Iterable[Spread | None]) -> bool:
    """Return whether the values of the seeds do not overlap for two of the arms."""
    present = [one for one in spreads if one is not None]
    return any(one.low > other.high or other.low > one.high for one, other in itertools.combinations(present, 2))
