"""Cells of the tables of the report: the column headings and the rows."""

from pretrain.report import narrative
from pretrain.report.arms import flatten
from pretrain.report.overfitting import Overfitting
from pretrain.report.sensitivity import WITHIN, KeyScores
from pretrain.report.summary import Spread, Summaries, Summary, spread

AMOUNTS = ("tokens", "flops", "seconds")
"""Amounts that a run consumes."""
PAST = [
    "arm",
    "lowest validation loss",
    "total tokens / tokens up to that loss",
    "loss increase from there to the end",
    "metric at that loss, interpolated",
    "metric change from there to the end",
]
"""Column headings of the table on overfitting."""
SENSITIVITY = ["key", "arm", "best value", "score", "good values", "width", "spread", "values tried"]
"""Column headings of the table on sensitivity."""
SENSITIVITY_REMARK = (
    "These are the scores of the tuning, on its rows. Good values are the best value and the values around it whose "
    f"mean scores are within {WITHIN:g} of the best, or within {WITHIN:.0%} of a best score above 1. Their width is "
    "the ratio of the largest and the smallest, and the spread is the standard deviation of all scores at them. Values "
    "that are not numbers have no width. Other tuned keys have their best values."
)
"""Remark on the table on sensitivity."""
DEFINITIONS = ["arm", "settings", "model", "rows per step", "training records"]
"""Column headings of the table with the definitions of the arms."""


def columns(summaries: Summaries) -> list[str]:
    """Return the column headings of the table of arms."""
    corrected = " (Holm)" if summaries.num_tested_arms > 1 else ""
    base = summaries.comparison.baseline
    compared = [f"difference from {base}", f"95% interval{corrected}", f"p{corrected}", "verdict"] if base else []
    costs = ["FLOPs a token", "seconds a token"] if base else []
    return [
        "arm",
        "seeds",
        str(summaries.comparison.metric),
        *compared,
        *_other_loss(summaries),
        "tokens",
        "FLOPs",
        "seconds",
        *costs,
    ]


def _other_loss(summaries: Summaries) -> list[str]:
    """Return the tag of the next-token loss of validation, unless it is the metric."""
    return [tag for tag in ("validation/loss/lm",) if tag != str(summaries.comparison.metric)]


def row(summaries: Summaries, summary: Summary) -> list[str]:
    """Return the cells of an arm in the table of arms."""
    test, baseline = summary.test, summaries.comparison.baseline
    compared: list[str] = []
    if baseline and summary.arm.name == baseline:
        compared = ["", "", "", "baseline"]
    elif baseline:
        assert test is not None  # every other arm has a test
        compared = [
            narrative.format_number(test.mean, True),
            narrative.format_interval(test),
            narrative.format_p_value(test.corrected_p),
            test.verdict,
        ]
    amounts = [consumed.mean if (consumed := summary.consumed(amount)) else None for amount in AMOUNTS]
    ratio = summary.seconds_ratio
    costs = (
        [f"× {summary.flops_ratio:.2f}" if summary.flops_ratio else "–", f"× {ratio.mean:.2f}" if ratio else "–"]
        if baseline
        else []
    )
    return [
        summary.arm.name,
        f"{len(summary.values)} of {summary.arm.planned}",
        narrative.format_spread(summary.metric),
        *compared,
        *(
            narrative.format_spread(summaries.losses.get(tag, {}).get(summary.arm.name))
            for tag in _other_loss(summaries)
        ),
        *map(_amount, amounts),
        *costs,
    ]


def rows_by_arm(values: dict[str, dict[str, Spread | None]]) -> list[list[str]]:
    """Return a row for each score or loss: its name and its spread in each arm."""
    return [[name, *map(narrative.format_spread, by_arm.values())] for name, by_arm in values.items()]


def definition_rows(summaries: Summaries) -> list[list[str]]:
    """Return a row for each arm that has runs; the column headings are DEFINITIONS.

    The settings are the changes of the base, with the best values of the tuning; for runs without a study, they are
    the keys in which the arms differ.
    """
    rows = []
    for name, summary in summaries.arms.items():
        arm = summary.arm
        if arm.first is None:
            continue
        config, model = arm.first.config, arm.first.config["model"]
        settings = flatten(arm.overrides) if arm.overrides else flatten(config.get("objective", {}), "objective.")
        shape = ", ".join(f"{key}={value}" for key, value in (model.get("shape") or {}).items())
        split = arm.first.environment.get("data", {}).get("corpus", {}).get("train", {})
        rows.append(
            [
                name,
                ", ".join(f"{key}={value}" for key, value in settings.items()),
                f"{model['family']} ({shape})" if model.get("family") else str(model.get("init_from")),
                str(config["train"]["global_batch_rows"]),
                f"{split['records']:,}" if split else "–",
            ]
        )
    return rows


def seed_rows(summaries: Summaries) -> list[list[str]]:
    """Return a row for each seed with the metric of each arm."""
    seeds = sorted({seed for summary in summaries.arms.values() for seed in summary.values})
    return [
        [str(seed), *(narrative.format_number(summary.values.get(seed)) for summary in summaries.arms.values())]
        for seed in seeds
    ]


def past_rows(past: Overfitting) -> list[list[str]]:
    """Return a row for each arm in the table on overfitting, whose column headings are PAST."""
    return [
        [
            name,
            narrative.format_spread(spread(arm.lowest.values())),
            f"{arm.times.mean:.1f}",
            narrative.format_spread(spread(arm.rise.values())),
            narrative.format_spread(spread(arm.metric.values())),
            narrative.format_spread(spread(arm.change.values())),
        ]
        for name, arm in past.arms.items()
    ]


def _amount(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value < 1e8 else f"{value:.2e}".replace("e+", "e")


def sensitivity_rows(measured: dict[str, list[KeyScores]]) -> list[list[str]]:
    """Return a row for each tuned key and arm; the column headings are SENSITIVITY."""
    return [
        [
            key,
            scores.arm,
            _format_value(scores.best) + " (edge)" * scores.at_edge,
            narrative.format_number(scores.best_mean),
            _format_good_values(scores),
            "–" if scores.width is None else f"× {scores.width:.3g}",
            narrative.format_number(scores.spread),
            str(len(scores.values)),
        ]
        for key, arms in measured.items()
        for scores in arms
    ]


def _format_value(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _format_good_values(scores: KeyScores) -> str:
    good = [_format_value(scores.values[index]) for index in scores.good]
    return f"{good[0]} to {good[-1]}" if scores.has_numbers else ", ".join(good)
