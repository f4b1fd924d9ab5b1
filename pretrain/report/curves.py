"""Curves over several seeds: the mean, and the range from the lowest to the highest seed."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pretrain.report.arms import Arm
from pretrain.report.runs import Metric, Run
from pretrain.report.summary import Summaries

Points = list[tuple[int, float]]


class Band(NamedTuple):
    """Curve of an arm over its seeds; all arrays have shape (n,)."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    """Lowest value of any seed."""
    high: np.ndarray
    """Highest value of any seed."""


def tag_bands(summaries: Summaries, tag: str, x_axis: str) -> dict[str, Band]:
    """Return the band of a tag of metrics.jsonl over `tokens`, `flops` or `seconds`, for each arm that has the tag."""
    return _bands(summaries, lambda run: run.curve(tag), x_axis)


def metric_bands(summaries: Summaries, metric: Metric, x_axis: str) -> dict[str, Band]:
    """Return the band of the metric at the evaluated checkpoints, for each arm that has the metric."""
    return _bands(summaries, lambda run: metric.curve(run, summaries.settings), x_axis)


def _bands(summaries: Summaries, curve: Callable[[Run], Points], x_axis: str) -> dict[str, Band]:
    bands = {}
    for name, summary in summaries.arms.items():
        factor = 1.0
        if x_axis == "flops":
            if summary.flops is None:
                continue
            factor = summary.flops
        runs = [(run, points) for run in _runs_to_show(summary.arm) if (points := curve(run))]
        if runs:
            key = "seconds" if x_axis == "seconds" else "tokens"
            bands[name] = join(
                [
                    (
                        [step for step, _ in points],
                        run.consumed(key, [step for step, _ in points]) * factor,
                        np.array([value for _, value in points]),
                    )
                    for run, points in runs
                ]
            )
    return bands


def _runs_to_show(arm: Arm) -> list[Run]:
    """Return the finished runs of an arm, or all runs of the arm if none is finished."""
    return [run for run in arm.runs.values() if run.finished] or list(arm.runs.values())


def join(curves: list[tuple[list[int], np.ndarray, np.ndarray]]) -> Band:
    """Join the curves of several seeds, each with its steps, x and y, into one band.

    If all seeds have values at the same steps, x and y are means over seeds at each step. If not, each seed's curve is
    interpolated linearly, and the band covers the range of x that all seeds have.
    """
    steps, x, y = curves[0]
    if all(other == steps for other, _, _ in curves):
        xs, ys = (np.stack([curve[part] for curve in curves]) for part in (1, 2))
        return Band(xs.mean(axis=0), ys.mean(axis=0), ys.min(axis=0), ys.max(axis=0))
    start, end = max(curve[1][0] for curve in curves), min(curve[1][-1] for curve in curves)
    grid = np.unique(np.concatenate([curve[1] for curve in curves]))
    grid = grid[(grid >= start) & (grid <= end)]
    if not len(grid):  # the seeds have no range of x in common: return only the first seed
        return Band(x, y, y, y)
    ys = np.stack([np.interp(grid, other_x, other_y) for _, other_x, other_y in curves])
    return Band(grid, ys.mean(axis=0), ys.min(axis=0), ys.max(axis=0))
