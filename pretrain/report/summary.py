"""Summary of each arm: the metric and its test, amounts consumed, cost per token, and collapse of the embeddings."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data_prep.utils.console import UserError
from pretrain.objectives.collapse import has_collapsed
from pretrain.report.arms import Arm, Comparison
from pretrain.report.cost import flops_per_token
from pretrain.report.runs import Metric, Run
from pretrain.report.statistics import PairedTest, compare_with_primary, untested
from pretrain.tasks.directions import VALIDATION

MONITORS = ("paired_cosine", "shuffled_cosine", "retrieval_at_1", "effective_rank")


class Spread(NamedTuple):
    """Statistics of a value over several seeds."""

    mean: float
    sd: float | None
    """Standard deviation of the sample; None for one seed."""
    low: float
    high: float
    seeds: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Summarise the values that are not None; return None if there are none."""
    present = np.array([value for value in values if value is not None], dtype=float)
    if not len(present):
        return None
    return Spread(
        float(present.mean()),
        float(present.std(ddof=1)) if len(present) > 1 else None,
        float(present.min()),
        float(present.max()),
        len(present),
    )


@dataclass(frozen=True)
class Summary:
    """Summary of an arm."""

    arm: Arm
    finished: list[Run]
    values: dict[int, float]
    """Metric at the end of each finished run, by seed."""
    test: PairedTest | None
    """Test against the baseline; None for the baseline itself."""
    flops: float | None
    """FLOPs per corpus token; None if they could not be counted."""
    flops_ratio: float | None
    """FLOPs per corpus token, relative to the baseline."""
    seconds_ratio: Spread | None
    """Seconds per corpus token, relative to the baseline: the ratio of means, and the extremes over seeds."""
    processor_ratio: Spread | None = None
    """The same for processor seconds; None on a GPU, or if they were not recorded."""
    monitors: dict[str, Spread] = field(default_factory=dict)
    """Embedding monitors with targets that are encoded separately."""
    in_context_monitors: dict[str, Spread] = field(default_factory=dict)
    """Embedding monitors of targets in context; empty if the arm has no such targets."""
    collapsed: list[int] = field(default_factory=list)
    """Seeds whose embeddings have collapsed."""

    @property
    def metric(self) -> Spread | None:
        """Spread of the metric over the seeds."""
        return spread(self.values.values())

    def consumed(self, amount: str) -> Spread | None:
        """Return the amount that the finished runs consumed; None if unknown.

        The amount is `tokens`, `flops`, `seconds` or `processor_seconds`.
        """
        if amount == "flops":
            return spread(self.flops * run.last["tokens"] for run in self.finished) if self.flops else None
        if amount == "processor_seconds":
            values = [run.processor_seconds for run in self.finished]
            return spread(values) if all(values) else None
        return spread(run.last[amount] for run in self.finished)


@dataclass(frozen=True)
class Summaries:
    """Summaries of all arms, the baseline first."""

    comparison: Comparison
    arms: dict[str, Summary]
    settings: str | None
    """Settings of the evaluations that are compared; see `Metric.common_settings`."""
    flops_unavailable_reason: str
    """Reason why FLOPs are not counted; empty if they are counted."""
    scores: dict[str, dict[str, Spread | None]]
    """TASK/NAME of each metric of each task -> arm -> values of the metric at the end of the finished runs."""
    losses: dict[str, dict[str, Spread | None]]
    """Tag of the validation loss of each term -> arm -> values of the loss at the end of the finished runs."""

    @property
    def baseline(self) -> Summary | None:
        """Summary of the baseline; None if there is none."""
        baseline = self.comparison.baseline
        return None if baseline is None else self.arms.get(baseline)

    @property
    def tests(self) -> dict[str, PairedTest]:
        """Tests of all arms except the baseline, by arm."""
        return {name: summary.test for name, summary in self.arms.items() if summary.test}

    @property
    def num_tested_arms(self) -> int:
        """Number of arms that were tested together; their p and intervals are corrected for it."""
        return max((test.arms for test in self.tests.values() if test.corrected_p is not None), default=0)


def summarize(comparison: Comparison) -> Summaries:
    """Summarise all arms and test them against the baseline."""
    settings = comparison.metric.common_settings(comparison.runs)
    values = {
        name: {
            seed: value
            for seed, run in arm.runs.items()
            if (value := comparison.metric.final(run, settings)) is not None
        }
        for name, arm in comparison.arms.items()
    }
    tests: dict[str, PairedTest] = {}
    baseline_arm = None
    if comparison.baseline is not None:
        others = {arm.name: values[arm.name] for arm in comparison.others}
        base = values[comparison.baseline]
        tests = (
            untested(others, base, comparison.pending)
            if comparison.pending
            else compare_with_primary(others, base, comparison.metric.higher_is_better, comparison.primary)
        )
        baseline_arm = comparison.arms.get(comparison.baseline)
    flops, problem = _all_flops(comparison)
    arms = {}
    for name, arm in comparison.arms.items():
        finished = [run for run in arm.runs.values() if run.finished]
        arms[name] = Summary(
            arm,
            finished,
            values[name],
            tests.get(name),
            flops.get(name),
            flops[name] / flops[comparison.baseline] if flops and comparison.baseline else None,
            _seconds_ratio(arm, baseline_arm, lambda run: run.last["seconds"]) if baseline_arm else None,
            _seconds_ratio(arm, baseline_arm, lambda run: run.processor_seconds) if baseline_arm else None,
            _monitors(finished, "embedding"),
            _monitors(finished, "embedding_in_context"),
            [run.seed for run in finished if _collapsed(run)],
        )
    return Summaries(comparison, arms, settings, problem, _scores(comparison), _losses(arms, comparison.loss_terms))


def _scores(comparison: Comparison) -> dict[str, dict[str, Spread | None]]:
    names = dict.fromkeys(
        (result["task"], name) for run in comparison.runs for result in run.results for name in result["metrics"]
    )
    scores = {}
    for metric in (Metric(task, name, True) for task, name in names):
        settings = metric.common_settings(comparison.runs)
        scores[str(metric)] = {
            name: spread(metric.final(run, settings) for run in arm.runs.values())
            for name, arm in comparison.arms.items()
        }
    return scores


def _losses(arms: dict[str, Summary], terms: list[str]) -> dict[str, dict[str, Spread | None]]:
    losses = {
        tag: {name: spread(run.value(tag) for run in arm.finished) for name, arm in arms.items()}
        for tag in (f"{VALIDATION}/loss/{term}" for term in terms)
    }
    return {tag: by_arm for tag, by_arm in losses.items() if any(by_arm.values())}


def _all_flops(comparison: Comparison) -> tuple[dict[str, float], str]:
    """Return the FLOPs per corpus token of each arm, as recorded in the study or else counted now.

    If they are unknown for one arm, return an empty dict and the reason.
    """
    flops = {}
    for arm in comparison.arms.values():
        if arm.flops_per_token is not None:
            flops[arm.name] = arm.flops_per_token
            continue
        if arm.first is None:
            return {}, f"the arm {arm.name} has no run yet"
        try:
            flops[arm.name] = flops_per_token(arm.first)
        except UserError as error:
            return {}, f"{arm.first.folder}: {error}"
    return flops, ""


def _seconds_ratio(arm: Arm, baseline: Arm, seconds: Callable[[Run], float | None]) -> Spread | None:
    """Return the ratio of `seconds` per corpus token over the seeds for which both arms have them."""

    def seconds_per_token(runs: dict[int, Run]) -> dict[int, float]:
        return {
            seed: value / float(run.last["tokens"])
            for seed, run in runs.items()
            if run.finished and (value := seconds(run)) is not None
        }

    times, other_times = seconds_per_token(arm.runs), seconds_per_token(baseline.runs)
    seeds = [seed for seed in times if seed in other_times]
    ratios = spread(times[seed] / other_times[seed] for seed in seeds)
    return ratios and ratios._replace(
        mean=sum(times[seed] for seed in seeds) / sum(other_times[seed] for seed in seeds)
    )


def _monitors(runs: Sequence[Run], group: str) -> dict[str, Spread]:
    """Return the last value of each embedding monitor: from validation, or else from the last logged micro step."""
    spreads = {
        name: spread(run.value(f"validation/{group}/{name}", f"{group}/{name}") for run in runs) for name in MONITORS
    }
    return {name: values for name, values in spreads.items() if values}


def _collapsed(run: Run) -> bool:
    """Return whether the embeddings have collapsed; False if no term on pairs trains them at the end of the run."""
    tags = {name: (f"validation/{run.embedding_group}/{name}", f"{run.embedding_group}/{name}") for name in MONITORS}
    monitors = {name: value for name in MONITORS if (value := run.value(*tags[name])) is not None}
    in_context = run.embedding_group != "embedding"
    return (
        run.has_pair_term
        and not run.switched_off
        and len(monitors) == len(MONITORS)
        and has_collapsed(monitors, in_context)
    )
