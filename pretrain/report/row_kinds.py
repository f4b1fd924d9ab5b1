"""Kinds of test rows that an arm gains or loses: operators, lengths, and how often the target was seen.

For each row and seed, the difference between an arm and the baseline is 1, 0 or -1: whether the arm is right, minus
whether the baseline is right with the same seed. Its mean over the seeds and the rows of a kind gets a 95% interval.
Seeds and rows are both samples, and every seed answers every row. In this two-way layout, the variance of the mean is
estimated from the expected mean squares (Cornfield and Tukey, "Average values of mean squares in factorials", Annals of
Mathematical Statistics 27, 1956):

    variance of the seeds' means / S + max(0, variance of the rows' means / R - residual variance / (S R))

The first term is the one of a paired t-test over seeds. The second adds the spread of rows that all seeds share, so the
interval is never narrower than the interval of the t-test. The factor is the quantile of Student's t with min(S, R) - 1
degrees of freedom. This is more cautious than Satterthwaite's approximation, which few seeds do not allow. In
simulations with 2 to 6 seeds and 10 to 250 rows, 95% to 100% of the intervals contained the true difference.

The intervals do not cover: the choice of the training data and of the settings, rows that depend on each other (several
rows with the same context), and the number of intervals, for which they are not corrected. With few rows or rare
differences, the normal distribution that they assume is a rough approximation.
"""

import itertools
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from data_prep.utils.console import UserError
from pretrain.config import load_config
from pretrain.data.corpus import Corpus, count_in_corpus
from pretrain.report.arms import Comparison
from pretrain.report.cost import open_corpus
from pretrain.report.examples import read_answers
from pretrain.report.narrative import format_number, join_names
from pretrain.report.runs import Metric, Run, tasks_by_title
from pretrain.report.statistics import EQUAL, format_seeds
from pretrain.tasks.rows import RowKinds, RowRate, lengths, row_kinds, row_rates
from pretrain.tasks.scoring import Answer

logger = logging.getLogger(__name__)

ALPHA = 0.05
"""Probability that an interval does not contain the true difference."""
FEWEST_ROWS = 10
"""Smallest number of rows for which an interval is shown."""
MOST_KINDS = 15
"""Maximum number of kinds that are shown for an arm."""
ALL_ROWS = "all rows"
"""Name of the kind that holds every row."""
Kinds = dict[str, np.ndarray]
"""Mask of the rows of each kind, (R,), by its name."""
Row = tuple[str, str, int]
"""Context, target, and the number of earlier rows with the same context and target."""
Answers = dict[Row, dict[str, Any]]
"""Lines of the answers of a run, by row."""


@dataclass(frozen=True)
class Difference:
    """Difference between an arm and the baseline on the rows of a kind."""

    kind: str
    seeds: int
    """Number of seeds that both have."""
    rows: int
    baseline: float
    """Fraction of the seeds and rows that are right in the baseline."""
    arm: float
    """Fraction of the seeds and rows that are right in the arm."""
    low: float | None
    """Lower end of the 95% interval; None if there are too few seeds or rows, or if all differences are equal."""
    high: float | None

    @property
    def mean(self) -> float:
        """Mean difference, arm minus baseline."""
        return self.arm - self.baseline


@dataclass(frozen=True)
class RowDifferences:
    """Differences of all arms by kind, or the reason why there are none."""

    rate: str
    """Name of the rate by which a row counts as right."""
    problem: str = ""
    """Sentence about what is missing; empty if there are differences."""
    arms: dict[str, list[Difference]] = field(default_factory=dict)
    """Differences by arm, in the same order of kinds."""
    remarks: list[str] = field(default_factory=list)
    """Sentences on the rate, the intervals, and the runs and rows that are not used."""


def interval(differences: np.ndarray) -> tuple[float, float] | None:
    """Return the 95% interval of the mean of the differences (S, R) between two arms.

    It is None with a single seed, with fewer than FEWEST_ROWS rows, and if the estimated variance is 0.
    """
    seeds, rows = differences.shape
    if seeds < 2 or rows < FEWEST_ROWS:
        return None
    mean, by_seed, by_row = differences.mean(), differences.mean(axis=1), differences.mean(axis=0)
    residuals = differences - by_seed[:, None] - by_row + mean
    residual_variance = (residuals**2).sum() / ((seeds - 1) * (rows - 1))
    variance_of_seeds = by_seed.var(ddof=1) / seeds
    variance_of_rows = by_row.var(ddof=1) / rows - residual_variance / (seeds * rows)
    error = math.sqrt(variance_of_seeds + max(0.0, variance_of_rows))
    if error < EQUAL:
        return None
    half_width = t.isf(ALPHA / 2, min(seeds, rows) - 1) * error
    return float(mean - half_width), float(mean + half_width)


def differences_by_kind(arm: np.ndarray, baseline: np.ndarray, kinds: Kinds) -> list[Difference]:
    """Compare an arm with the baseline on each kind of rows; both arrays hold whether a row is right, (S, R)."""
    differences = arm.astype(float) - baseline.astype(float)
    results = []
    for kind, mask in kinds.items():
        low, high = interval(differences[:, mask]) or (None, None)
        before, after = (float(right[:, mask].mean()) for right in (baseline, arm))
        results.append(Difference(kind, len(arm), int(mask.sum()), before, after, low, high))
    return results


def group_rows(properties: Sequence[RowKinds]) -> Kinds:
    """Group the rows by each of their properties: a number in quartiles, a tuple by each of its texts.

    The first kind holds all rows. Other kinds that hold all rows are skipped. At most MOST_KINDS kinds are returned.
    """
    kinds: Kinds = {ALL_ROWS: np.ones(len(properties), bool)}
    for name in dict.fromkeys(name for row in properties for name in row):
        values = [row.get(name, ()) for row in properties]
        numbers = [value for value in values if isinstance(value, int)]
        groups = (
            quartiles(numbers)
            if len(numbers) == len(values)
            else [value if isinstance(value, tuple) else (str(value),) for value in values]
        )
        for text in sorted({text for texts in groups for text in texts}, key=_natural_order):
            mask = np.array([text in texts for texts in groups])
            if not mask.all():
                kinds[f"{name}: {text}"] = mask
    return dict(itertools.islice(kinds.items(), MOST_KINDS))


def _natural_order(text: str) -> tuple[float, str]:
    """Return a key that sorts texts that begin with a number by this number, and after them all other texts."""
    first = text.split(" ", 1)[0].replace(",", "")
    return (float(first) if first.isdecimal() else math.inf, text)


def quartiles(values: Sequence[int]) -> list[tuple[str]]:
    """Return for each value the range of the quartile that it belongs to. Equal values are in the same quartile."""
    edges = np.quantile(values, [0.25, 0.5, 0.75])
    quarters = np.searchsorted(edges, values, side="left")
    names = {}
    for quarter in np.unique(quarters):
        low, high = (function(np.array(values)[quarters == quarter]) for function in (np.min, np.max))
        names[quarter] = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return [(names[quarter],) for quarter in quarters]


def name_frequency(count: int) -> str:
    """Return the name of the kind of rows whose target occurs `count` times."""
    return str(count) if count < 2 else "2 to 10" if count <= 10 else "more than 10"


def compare_rows(comparison: Comparison) -> RowDifferences | None:
    """Compare the arms by kind of row.

    Returns None if there is no other arm than the baseline, if the task of the metric declares no rate of a single row,
    or if the study is unfinished.
    """
    title, baseline = comparison.metric.task, comparison.baseline
    tasks = (tasks_by_title(run.config).get(title) for run in comparison.runs)
    task = next((task["name"] for task in tasks if task), title)
    rates = row_rates(task)
    if not rates or baseline is None or not comparison.others or comparison.pending:
        return None
    rate = comparison.metric.name if comparison.metric.name in rates else next(iter(rates))
    answers = {
        arm.name: {seed: lines for seed, run in arm.runs.items() if (lines := read_answers(run, title))}
        for arm in comparison.arms.values()
    }
    pairs = {arm.name: sorted(answers[arm.name].keys() & answers[baseline].keys()) for arm in comparison.others}
    pairs = {name: seeds for name, seeds in pairs.items() if seeds}
    if not pairs:
        return RowDifferences(
            rate,
            "This section needs the answers of finished runs, in evaluation/answers of the run directories: no arm "
            f"shares a seed with the baseline for which both have saved answers of the task {title} at the last step.",
        )
    compared = [answers[name][seed] for name, seeds in pairs.items() for seed in seeds]
    compared += [answers[baseline][seed] for seed in sorted({seed for seeds in pairs.values() for seed in seeds})]
    shared = set(compared[0]).intersection(*compared[1:])
    rows = [row for row in compared[0] if row in shared]
    if not rows:
        return RowDifferences(rate, "The runs have answered different test rows, so there are no rows to compare.")

    kinds = group_rows(_properties(task, rows, comparison.arms[baseline].runs[next(iter(pairs.values()))[0]]))

    def hits(name: str, seeds: list[int]) -> np.ndarray:
        return np.array([_hits(answers[name][seed], rows, rates[rate]) for seed in seeds])

    arms = {name: differences_by_kind(hits(name, seeds), hits(baseline, seeds), kinds) for name, seeds in pairs.items()}
    remarks = [_rate_remark(comparison.metric, rate), _intervals_remark(arms)]
    skipped = len(set().union(*compared)) - len(rows)
    remarks += [f"{skipped:,} rows are skipped, because some of these runs have not answered them."] if skipped else []
    remarks += _missing(comparison, answers, pairs) + _other_evaluations(comparison, answers, rate, rates[rate])
    return RowDifferences(rate, "", arms, remarks)


def _hits(answers: Answers, rows: Sequence[Row], is_right: RowRate) -> list[bool]:
    return [is_right(row[1], Answer(str(answers[row]["answer"]), answers[row]["stopped"] is True)) for row in rows]


def _properties(task: str, rows: Sequence[Row], run: Run) -> list[RowKinds]:
    """Return the properties of each row; a task that defines none gets lengths and the frequency of the target."""
    if function := row_kinds(task):
        return [function(target, context) for context, target, _ in rows]
    counts, place = _frequencies(run, [target for _, target, _ in rows])
    return [
        lengths(target, context) | {f"target in {place}": (name_frequency(count),)}
        for (context, target, _), count in zip(rows, counts, strict=True)
    ]


def _frequencies(run: Run, targets: list[str]) -> tuple[list[int], str]:
    """Return how often each target occurs in the training split of the corpus, or else in the test rows, and where."""
    try:
        config = load_config(run.folder / "config.yaml")
        return _count_in_corpus(open_corpus(run, config, "train").folder, tuple(targets)), "the training split"
    except UserError:
        counts = Counter(targets)
        return [counts[target] for target in targets], "the test rows"


@lru_cache(maxsize=1)
def _count_in_corpus(folder: Path, targets: tuple[str, ...]) -> list[int]:
    """Count the targets in the training split; the page and the Markdown file need the same counts."""
    logger.info("counting the targets of the test rows in the training split")
    return count_in_corpus(Corpus(folder, "train"), targets)


def _rate_remark(metric: Metric, rate: str) -> str:
    if metric.name == rate:
        return f"A row is right if it counts for {metric}."
    return f"The metric {metric} does not follow from the saved answers alone, so this section uses {rate} instead."


def _intervals_remark(arms: dict[str, list[Difference]]) -> str:
    count = sum(difference.low is not None for differences in arms.values() for difference in differences)
    if count == 0:
        return "No interval is shown: the runs have too few seeds or rows, or the differences have no spread."
    return (
        f"Intervals shown: {count}. They are exploratory: each contains its own difference with a probability of at "
        "least about 95%, and they are not corrected for their number."
    )


def _missing(comparison: Comparison, answers: dict[str, dict[int, Answers]], pairs: dict[str, list[int]]) -> list[str]:
    """Return a sentence that names the runs without answers, and one that names the seeds without a partner."""
    missing, unpaired = [], []
    shared = {seed for seeds in pairs.values() for seed in seeds}
    for arm in comparison.arms.values():
        without = sorted({*arm.runs, *arm.missing_runs} - answers[arm.name].keys())
        missing += [f"{arm.name} ({format_seeds(without)})"] if without else []
        used = shared if arm.name == comparison.baseline else set(pairs.get(arm.name, []))
        alone = sorted(answers[arm.name].keys() - used)
        unpaired += [f"{arm.name} ({format_seeds(alone)})"] if alone else []
    sentences = [f"These runs have no answers at the end of training: {join_names(missing)}."] if missing else []
    if unpaired:
        sentences.append(f"These runs are not used, because their partner has no answers: {join_names(unpaired)}.")
    return sentences


def _other_evaluations(
    comparison: Comparison, answers: dict[str, dict[int, Answers]], name: str, is_right: RowRate
) -> list[str]:
    """Return a sentence that names the runs whose answers have another rate than the result that is compared.

    The answers of a later evaluation of the same task and step replace the earlier answers.
    """
    metric = Metric(comparison.metric.task, name, True)
    settings = metric.common_settings(comparison.runs)
    differing = []
    for arm in comparison.arms.values():
        seeds = [
            seed
            for seed, rows in answers[arm.name].items()
            if (result := metric.final(arm.runs[seed], settings)) is not None
            and abs(float(np.mean(_hits(rows, list(rows), is_right))) - result) > EQUAL
        ]
        differing += [f"{arm.name} ({format_seeds(seeds)})"] if seeds else []
    if not differing:
        return []
    return [
        f"The saved answers of these runs do not have the {name} of the result that is compared, for example because "
        f"the task was evaluated several times: {join_names(differing)}."
    ]


def table_heads(comparison: Comparison, differences: RowDifferences) -> list[str]:
    """Return the column headings of the table of kinds."""
    return [
        "arm",
        "seeds",
        "kind of row",
        "rows",
        f"{differences.rate} of {comparison.baseline}",
        f"{differences.rate} of the arm",
        "difference",
        "95% interval (uncorrected)",
    ]


def table_rows(differences: RowDifferences) -> list[list[str]]:
    """Return the rows of the table of kinds."""
    return [
        [
            name,
            str(difference.seeds),
            difference.kind,
            f"{difference.rows:,}",
            format_number(difference.baseline),
            format_number(difference.arm),
            format_number(difference.mean, True),
            "–"
            if difference.low is None
            else f"{format_number(difference.low, True)} to {format_number(difference.high, True)}",
        ]
        for name, kinds in differences.arms.items()
        for difference in kinds
    ]
