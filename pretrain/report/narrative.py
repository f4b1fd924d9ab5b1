"""What the numbers say, in sentences: the verdict, what it costs, and what to be careful about."""

from typing import get_args

from pretrain.report.arms import NOT_SET, differing_keys, flatten, shorten, training_settings
from pretrain.report.overfitting import Overfitting
from pretrain.report.runs import finetune_settings, parse_scoring_version
from pretrain.report.statistics import POWER, PairedTest, Verdict, format_seeds
from pretrain.report.summary import Spread, Summaries, Summary, spread
from pretrain.tasks.directions import VALIDATION

CLOSE = 0.02
"""Difference in tokens, FLOPs or seconds up to which arms count as matched."""
FEW_SEEDS = 6
"""From here on a test of signs alone could find something: 2 of 2^6 outcomes are less than 5%."""
UNEVEN = 1.25
"""Ratio of the seconds of two seeds of an arm from which these are no measure of it."""
AMOUNTS = {"tokens": "corpus tokens", "flops": "FLOPs", "seconds": "seconds"}


def format_number(value: float | None, sign: bool = False) -> str:
    """Four decimals from 0.0001 to 10, else four digits; a dash for none."""
    if value is None:
        return "–"
    plus = "+" if sign else ""
    if value == 0 or 1e-4 <= abs(value) < 10:
        text = f"{value:{plus}.4f}"
    else:
        text = f"{value:{plus},.0f}" if 1000 <= abs(value) < 1e6 else f"{value:{plus}.4g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def format_spread(value: Spread | None) -> str:
    """Mean ± standard deviation, with as many decimals."""
    if value is None:
        return "–"
    mean = format_number(value.mean)
    decimals = len(mean.partition(".")[2]) if "e" not in mean else 4
    return mean + (f" ± {value.sd:,.{decimals}f}" if value.sd is not None else "")


def format_p_value(p: float | None) -> str:
    """Format a p value."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_interval(test: PairedTest | None) -> str:
    """Format the interval of a test."""
    return (
        "–"
        if test is None or test.low is None
        else f"{format_number(test.low, True)} to {format_number(test.high, True)}"
    )


def headline(all_arms: Summaries) -> str:
    """The verdict in a sentence."""
    tests, comparison = all_arms.tests, all_arms.comparison
    if not tests:
        return f"No verdict: there is one arm, {next(iter(comparison.arms))}, and nothing to compare it with."
    if len(tests) == 1:
        return verdict(all_arms, next(iter(tests)))
    by_verdict = {kind: [name for name, test in tests.items() if test.verdict == kind] for kind in get_args(Verdict)}
    parts = [
        f"{join_names([f'{name} ({format_number(tests[name].mean, True)})' for name in names])} {word if len(names) == 1 else word[:-1]}"
        for word in ("helps", "hurts")
        if (names := by_verdict[word])
    ]
    if names := by_verdict["no difference found"]:
        parts.append(f"for {join_names(names)} no difference was found")
    if names := by_verdict["no verdict"]:
        parts.append(f"for {join_names(names)} there is no verdict")
    return f"Against {comparison.baseline} in {comparison.metric}, {'; '.join(parts)}."


def join_names(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def verdict(all_arms: Summaries, name: str) -> str:
    """Of one arm, in a sentence with its numbers."""
    comparison, test = all_arms.comparison, all_arms.tests[name]
    metric, baseline = comparison.metric, comparison.baseline
    assert baseline is not None  # or there would be no test
    if test.verdict == "no verdict":
        seen = (
            ""
            if test.mean is None
            else f" (the difference to {baseline} in {metric} is {format_number(test.mean, True)})"
        )
        return f"{name}: no verdict, because {test.reason}{seen}."
    paired = f"over {len(test.seeds)} seeds"
    if test.p is None:
        return f"{name}: no difference found to {baseline} in {metric}: {test.reason} ({len(test.seeds)})."
    numbers = (
        f"{format_number(test.mean, True)} {paired}, 95% interval {format_interval(test)}, p = {format_p_value(test.corrected_p)}".replace(
            "= <", "<"
        )
        + (f" after correction for {all_arms.num_tested_arms} arms" if all_arms.num_tested_arms > 1 else "")
    )
    if test.verdict == "no difference found":
        return (
            f"{name}: no difference found to {baseline} in {metric} ({numbers}). With these seeds and this spread, only a true difference of "
            f"±{format_number(test.min_detectable)} or more would have been found with a chance of {POWER:.0%}."
        )
    mine, other = (all_arms.arms[arm].values for arm in (name, baseline))
    means = [sum(values[seed] for seed in test.seeds) / len(test.seeds) for values in (mine, other)]
    return f"{name} {test.verdict}: {metric} is {format_number(means[0])} against {format_number(means[1])} of {baseline} ({numbers})."


def overfitting_sentences(all_arms: Summaries, past: Overfitting) -> list[str]:
    """Which arm holds past the best validation loss, a sentence for each arm and measure, and for which runs the metric is not known there."""
    metric, baseline = all_arms.comparison.metric, all_arms.comparison.baseline
    sentences = [
        f"{name}: {format_seeds(arm.not_bracketed)} had no checkpoint evaluated on both sides of the lowest validation loss, or not the last one, "
        f"and {'are' if len(arm.not_bracketed) > 1 else 'is'} left out of {metric} here."
        for name, arm in past.arms.items()
        if arm.not_bracketed
    ]
    if baseline is None:
        return sentences
    measures = [
        ("validation/loss/lm", past.rises, {name: arm.rise for name, arm in past.arms.items()}),
        (str(metric), past.changes, {name: arm.change for name, arm in past.arms.items()}),
    ]
    for measure, tests, values in measures:
        for name, test in tests.items():
            if not test.seeds:
                continue
            mine, other = (
                format_number(sum(values[arm][seed] for seed in test.seeds) / len(test.seeds), True)
                for arm in (name, baseline)
            )
            told = {
                "helps": "holds better than",
                "hurts": "holds worse than",
                "no difference found": "no difference found to",
                "no verdict": "no verdict against",
            }[test.verdict]
            numbers = f"{format_number(test.mean, True)} over {len(test.seeds)} seed{'s' * (len(test.seeds) > 1)}"
            if test.p is not None:
                numbers += f", 95% interval {format_interval(test)}, p = {format_p_value(test.corrected_p)}".replace(
                    "= <", "<"
                )
            elif test.reason:
                numbers += f"; {test.reason}"
            subject = f"{name} {told}" if test.verdict in ("helps", "hurts") else f"{name}: {told}"
            sentences.append(
                f"{subject} {baseline} in {measure} past the best validation loss: {mine} against {other} ({numbers})."
            )
    return sentences


def cost_sentences(all_arms: Summaries) -> dict[str, str]:
    """What each arm takes for the same corpus tokens, in a sentence."""
    sentences = {}
    for name, arm in all_arms.arms.items():
        if name == all_arms.comparison.baseline or not (arm.flops_ratio or arm.seconds_ratio):
            continue
        parts = [f"{arm.flops_ratio:.2f} times the FLOPs"] if arm.flops_ratio else []
        if ratio := arm.seconds_ratio:
            parts.append(
                f"{ratio.mean:.2f} times the seconds"
                + (f" ({ratio.low:.2f} to {ratio.high:.2f} by seed)" if ratio.seeds > 1 else "")
            )
        sentences[name] = f"A corpus token costs {name} {' and '.join(parts)} of {all_arms.comparison.baseline}."
    return sentences


def caveats(all_arms: Summaries) -> list[str]:
    """What a reader must know before believing the verdict."""
    parts = (_scorings, _missing, _collapses, _metric, _matching, _differences, _seconds)
    return [sentence for part in parts for sentence in part(all_arms)]


def _scorings(all_arms: Summaries) -> list[str]:
    """Name the runs that another version of the scoring has scored, whose values do not compare."""
    metric = all_arms.comparison.metric
    if all_arms.settings is None or metric.task == VALIDATION:
        return []
    version = parse_scoring_version(all_arms.settings)
    others = {
        run.folder.name: found
        for run in all_arms.comparison.runs
        if (found := metric.scoring_versions(run)) and version not in found
    }
    if not others:
        return []
    told = ", ".join(f"{name} (version {', '.join(map(str, sorted(found)))})" for name, found in others.items())
    return [
        f"Scores of {metric} are of different versions of the scoring: those of version {version} are compared, those of {told} are left "
        "out. Evaluate these runs again: python launcher/evaluate.py RUN_DIR."
    ]


def _missing(all_arms: Summaries) -> list[str]:
    metric, found = all_arms.comparison.metric, []
    for arm in all_arms.arms.values():
        planned = arm.arm.planned
        if len(arm.values) == planned:
            continue
        without = [f"seed {seed} is not there" for seed in arm.arm.missing_runs]
        for seed, run in arm.arm.runs.items():
            if not run.finished:
                without.append(
                    f"seed {seed} is {run.status.get('status', 'not started')} at step {run.last.get('step', 0)}"
                )
            elif seed not in arm.values:
                without.append(
                    f"seed {seed} has no {metric} at its last step"
                    + (", or under other settings" if metric.results(run) else "")
                )
        found.append(f"{arm.arm.name}: {len(arm.values)} of {planned} runs count ({'; '.join(without)}).")
    return found


def _collapses(all_arms: Summaries) -> list[str]:
    names = [f"{arm.arm.name} ({format_seeds(arm.collapsed)})" for arm in all_arms.arms.values() if arm.collapsed]
    return (
        [
            f"The embeddings of {join_names(names)} have collapsed: unrelated views lie as close as pairs, or no prediction finds its own target. A low "
            "JEPA loss says nothing there."
        ]
        if names
        else []
    )


def _metric(all_arms: Summaries) -> list[str]:
    comparison, found = all_arms.comparison, []
    if not comparison.metric_origin.startswith("chosen"):
        found.append(f"The metric {comparison.metric} was {comparison.metric_origin}.")
    if all_arms.num_tested_arms > 1:
        found.append(
            f"{all_arms.num_tested_arms} arms are compared with one baseline: p and intervals are corrected for that (Holm). Other "
            "metrics are not tested, but for what a section on overfitting says: their differences are for looking only."
        )
    seeds = min((len(test.seeds) for test in all_arms.tests.values()), default=FEW_SEEDS)
    if 1 < seeds < FEW_SEEDS:
        found.append(
            f"{seeds} seeds are few: the test takes differences between seeds to be normally distributed, which so few cannot show. A test "
            f"without that, which asks only whether all seeds agree, needs {FEW_SEEDS}."
        )
    return found


def _matching(all_arms: Summaries) -> list[str]:
    """Which amounts the arms had alike."""
    if len(all_arms.arms) < 2:
        return []
    alike: list[tuple[str, str]] = []
    unlike: list[tuple[str, str]] = []
    for what, name in AMOUNTS.items():
        means = [amount.mean for arm in all_arms.arms.values() if (amount := arm.consumed(what))]
        if len(means) == len(all_arms.arms):
            apart = max(means) / min(means) - 1
            (unlike if apart > CLOSE else alike).append(
                (what, f"{name} (up to {apart:.0%} apart)" if apart > CLOSE else name)
            )
    matched_by = all_arms.comparison.matched_by
    found: list[str] = []
    if matched_by is not None and matched_by in [what for what, _ in unlike]:
        found.append(
            f"The study is matched by {AMOUNTS[matched_by]}, but the arms did not get the same: see the table."
        )
    if unlike:
        same = (
            f"The arms had the same {join_names([text for _, text in alike])}"
            if alike
            else "The arms had nothing alike"
        )
        found.append(
            f"{same}, not the same {join_names([text for _, text in unlike])}: the verdict holds at this matching only."
        )
    return found


def _differences(all_arms: Summaries) -> list[str]:
    comparison = all_arms.comparison
    first_runs = [arm.first for arm in comparison.arms.values() if arm.first]
    settings = [
        values | flatten(finetune_settings(run.config), "finetuning of ")
        for values, run in zip(training_settings(first_runs), first_runs, strict=True)
    ]
    found = []
    besides = [key for key in differing_keys(settings) if not key.startswith("objective.")]
    if besides:
        told = [
            f"{key} ({', '.join(dict.fromkeys(shorten(values.get(key, NOT_SET)) for values in settings))})"
            for key in besides
        ]
        found.append(f"Besides the objective, arms differ in {join_names(told)}.")
    environments = [run.environment for run in comparison.runs if run.environment]
    read = {
        str([environment.get("data", {}).get(part) for part in ("corpus", "tokenizer")]) for environment in environments
    }
    if len(read) > 1:
        found.append(
            "The runs did not read the same corpus with the same tokenizer: their losses do not compare, and their scores only with care."
        )
    machines = {
        f"{environment.get('ranks')} ranks on {environment.get('device')}, {environment.get('threads_per_rank')} threads each"
        for environment in environments
    }
    if len(machines) > 1:
        found.append(f"The runs had different machines ({'; '.join(sorted(machines))}): their seconds do not compare.")
    return found


def _seconds(all_arms: Summaries) -> list[str]:
    """Whether the clock can be believed."""
    speeds = [
        spread(run.last["seconds"] / run.last["tokens"] for run in arm.finished) for arm in all_arms.arms.values()
    ]
    uneven = max((one.high / one.low for one in speeds if one), default=1.0)
    return (
        [
            f"Seeds of the same arm took up to {uneven:.1f} times as long as others: the machine did other work too, so compare FLOPs rather than "
            "seconds."
        ]
        if uneven > UNEVEN
        else []
    )


def run_rows(summary: Summary) -> list[tuple[str, str, str, str, str]]:
    """The runs of an arm: seed, state, step, value of the metric, folder."""
    rows = [
        (
            str(seed),
            run.status.get("status", "unknown"),
            f"{run.last.get('step', 0):,}",
            format_number(summary.values.get(seed)),
            str(run.folder),
        )
        for seed, run in summary.arm.runs.items()
    ]
    return rows + [(str(seed), "missing", "–", "–", folder) for seed, folder in summary.arm.missing_runs.items()]
