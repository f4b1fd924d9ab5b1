"""Curves over seeds: a mean and the range around it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pretrain.report.arms import Arm
from pretrain.report.runs import Metric, Run
from pretrain.report.summary import Summaries

Points = list[tuple[int, float]]


class Band(NamedTuple):
    """Of an arm: (n,) each."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    """The lowest seed."""
    high: np.ndarray
    """The highest seed."""


def tag_bands(summaries: Summaries, tag: str, x_axis: str) -> dict[str, Band]:
    """A tag of metrics.jsonl by arm, against `tokens`, `flops` or `seconds`. Arms without it are left out."""
    return _bands(summaries, lambda run: run.curve(tag), x_axis)


def metric_bands(summaries: Summaries, metric: Metric, x_axis: str) -> dict[str, Band]:
    """The same of the metric, wherever checkpoints were evaluated."""
    return _bands(summaries, lambda run: metric.curve(run, summaries.settings), x_axis)


def _bands(summaries: Summaries, curve: Callable[[Run], Points], x_axis: str) -> dict[str, Band]:
    bands = {}
    for name, summary in summaries.arms.items():
        factor = 1.0
        if x_axis == "flops":
            if summary.flops is None:
                continue
            factor = summary.flops
        runs = [(run, points) for run in _shown(summary.arm) if (points := curve(run))]
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


def _shown(arm: Arm) -> list[Run]:
    """The finished runs; where none is, all."""
    return [run for run in arm.runs.values() if run.finished] or list(arm.runs.values())


def join(curves: list[tuple[list[int], np.ndarray, np.ndarray]]) -> Band:
    """Seeds, each with steps, x and y, as one band.

    Where all have values at the same steps, x and y are means over seeds, step by step. Else the values lie on straight lines between those
    of a seed, and the band ends where the first seed ends.
    """
    steps, x, y = curves[0]
    if all(other == steps for other, _, _ in curves):
        xs, ys = (np.stack([curve[part] for curve in curves]) for part in (1, 2))
        return Band(xs.mean(axis=0), ys.mean(axis=0), ys.min(axis=0), ys.max(axis=0))
    start, end = max(curve[1][0] for curve in curves), min(curve[1][-1] for curve in curves)
    grid = np.unique(np.concatenate([curve[1] for curve in curves]))
    grid = grid[(grid >= start) & (grid <= end)]
    if not len(grid):  # they have no stretch in common: the first alone
        return Band(x, y, y, y)
    ys = np.stack([np.interp(grid, other_x, other_y) for _, other_x, other_y in curves])
    return Band(grid, ys.mean(axis=0), ys.min(axis=0), ys.max(axis=0))
