"""Past the best validation loss: how far it rises again, and what becomes of the metric meanwhile."""

from dataclasses import dataclass

import numpy as np

from pretrain.report.runs import Run
from pretrain.report.statistics import PairedTest, compare, max_magnitude
from pretrain.report.summary import Spread, Summaries, spread
from pretrain.tasks.directions import VALIDATION

LOSS = f"{VALIDATION}/loss/lm"
RISE = 0.01
"""Share of the lowest validation loss by which some arm must lie above it at the end, or there is nothing to tell."""


@dataclass(frozen=True)
class Past:
    """The finished runs of an arm; values by seed."""

    lowest: dict[int, float]
    """Validation loss."""
    rise: dict[int, float]
    """Of the validation loss, from its lowest value to the end."""
    times: Spread
    """Tokens of the whole run, over those at the lowest validation loss."""
    metric: dict[int, float]
    """At the lowest validation loss, on a straight line between the evaluated checkpoints around it; of runs that have those, and the last."""
    change: dict[int, float]
    """Of the metric, from there to the end."""
    not_bracketed: list[int]
    """Seeds with several evaluated checkpoints, but none before and after the lowest validation loss, or not the last one."""


@dataclass(frozen=True)
class Overfitting:
    """All arms that have validation losses, and the tests of the others against the baseline."""

    arms: dict[str, Past]
    rises: dict[str, PairedTest]
    """Lower is better."""
    changes: dict[str, PairedTest]
    """Of the metric; empty where no run was evaluated more than once."""


def overfitting(summaries: Summaries) -> Overfitting | None:
    """None where no arm has overfitted."""
    arms = {name: past for name, summary in summaries.arms.items() if (past := _past(summaries, summary.finished))}
    if not any(_mean(past.rise) > RISE * _mean(past.lowest) for past in arms.values()):
        return None
    baseline, better = summaries.comparison.baseline, summaries.comparison.metric.higher_is_better
    if baseline is None or baseline not in arms:
        return Overfitting(arms, {}, {})
    others, base = {name: past for name, past in arms.items() if name != baseline}, arms[baseline]
    changes = {name: past.change for name, past in others.items() if past.change}
    losses = {name: _magnitude(past.lowest, base.lowest) for name, past in others.items()}
    scores = {name: _magnitude(past.metric, base.metric) for name, past in others.items()}
    return Overfitting(
        arms,
        compare({name: past.rise for name, past in others.items()}, base.rise, False, losses),
        compare(changes, base.change, better, scores),
    )


def _past(summaries: Summaries, runs: list[Run]) -> Past | None:
    lowest: dict[int, float] = {}
    rise, times, metric, change = (dict(lowest) for _ in range(4))
    not_bracketed: list[int] = []
    for run in runs:
        if not (curve := run.curve(LOSS)):
            continue
        step, value = min(curve, key=lambda point: point[1])
        lowest[run.seed], rise[run.seed] = value, curve[-1][1] - value
        times[run.seed] = run.last["tokens"] / run.consumed("tokens", [step])[0]
        scores = (
            []
            if summaries.comparison.metric.task == VALIDATION
            else summaries.comparison.metric.curve(run, summaries.settings)
        )
        if len(scores) < 2:
            continue
        steps, values = zip(*scores, strict=True)
        if not (steps[0] <= step <= steps[-1] == run.last["step"]):
            not_bracketed.append(run.seed)
            continue
        metric[run.seed] = float(np.interp(step, steps, values))
        change[run.seed] = scores[-1][1] - metric[run.seed]
    of_times = spread(times.values())
    return Past(lowest, rise, of_times, metric, change, not_bracketed) if of_times else None


def _mean(values: dict[int, float]) -> float:
    return float(np.mean(list(values.values())))


def _magnitude(values: dict[int, float], base: dict[int, float]) -> float:
    """Return the largest magnitude of two arms over the seeds that both have."""
    return max_magnitude(value for seed in values.keys() & base.keys() for value in (values[seed], base[seed]))
