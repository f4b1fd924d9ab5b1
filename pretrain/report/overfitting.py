"""Overfitting: the rise of the validation loss after its minimum, and the change of the metric over the same steps."""

from dataclasses import dataclass

import numpy as np

from pretrain.report.runs import Run
from pretrain.report.statistics import PairedTest, compare_with_primary, max_magnitude, untested
from pretrain.report.summary import Spread, Summaries, spread
from pretrain.tasks.directions import VALIDATION

LOSS = f"{VALIDATION}/loss/lm"
RISE = 0.01
"""Smallest relative rise of the validation loss above its minimum that counts as overfitting."""


@dataclass(frozen=True)
class Past:
    """Measures of overfitting of the finished runs of an arm, by seed."""

    lowest: dict[int, float]
    """Lowest validation loss."""
    rise: dict[int, float]
    """Rise of the validation loss from its lowest value to the end."""
    times: Spread
    """Tokens of the complete run divided by the tokens up to the lowest validation loss."""
    metric: dict[int, float]
    """Metric at the lowest validation loss, interpolated linearly between the evaluated checkpoints around it.

    A run has a value only if checkpoints before and after the lowest loss and at the last step were evaluated.
    """
    change: dict[int, float]
    """Change of the metric from the lowest validation loss to the end."""
    not_bracketed: list[int]
    """Seeds without a value in `metric`, although they have several evaluated checkpoints."""


@dataclass(frozen=True)
class Overfitting:
    """Overfitting of all arms that have validation losses, and tests of the other arms against the baseline.

    The primary arm is tested first.
    """

    arms: dict[str, Past]
    rises: dict[str, PairedTest]
    """Tests of the rises by arm; lower is better."""
    changes: dict[str, PairedTest]
    """Tests of the changes of the metric by arm; empty if no run was evaluated more than once."""


def overfitting(summaries: Summaries) -> Overfitting | None:
    """Compare how much the arms overfit; return None if no arm does."""
    arms = {name: past for name, summary in summaries.arms.items() if (past := _past(summaries, summary.finished))}
    if not any(_mean(past.rise) > RISE * _mean(past.lowest) for past in arms.values()):
        return None
    baseline, better = summaries.comparison.baseline, summaries.comparison.metric.higher_is_better
    if baseline is None or baseline not in arms:
        return Overfitting(arms, {}, {})
    others = {name: past for name, past in arms.items() if name != baseline}
    base = arms[baseline]
    changes = {name: past.change for name, past in others.items() if past.change}
    if pending := summaries.comparison.pending:
        rises = {name: past.rise for name, past in others.items()}
        return Overfitting(arms, untested(rises, base.rise, pending), untested(changes, base.change, pending))
    losses = {name: _magnitude(past.lowest, base.lowest) for name, past in others.items()}
    scores = {name: _magnitude(past.metric, base.metric) for name, past in others.items()}
    primary = summaries.comparison.primary
    return Overfitting(
        arms,
        compare_with_primary({name: past.rise for name, past in others.items()}, base.rise, False, primary, losses),
        compare_with_primary(changes, base.change, better, primary, scores),
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
    times_spread = spread(times.values())
    return Past(lowest, rise, times_spread, metric, change, not_bracketed) if times_spread else None


def _mean(values: dict[int, float]) -> float:
    return float(np.mean(list(values.values())))


def _magnitude(values: dict[int, float], base: dict[int, float]) -> float:
    """Return the largest magnitude of the values of two arms, over the seeds that both arms have."""
    return max_magnitude(value for seed in values.keys() & base.keys() for value in (values[seed], base[seed]))
