"""Sentences of the report: the verdict, the tuning and the cost of each arm."""

from typing import Any, get_args

from pretrain.report.overfitting import Overfitting
from pretrain.report.sensitivity import sensitivity
from pretrain.report.statistics import POWER, PairedTest, Verdict, format_seeds
from pretrain.report.summary import Spread, Summaries, Summary


def format_number(value: float | None, sign: bool = False) -> str:
    """Format a number: four decimals between 0.0001 and 10, otherwise about four digits; a dash for None."""
    if value is None:
        return "–"
    plus = "+" if sign else ""
    if value == 0 or 1e-4 <= abs(value) < 10:
        text = f"{value:{plus}.4f}"
    else:
        text = f"{value:{plus},.0f}" if 1000 <= abs(value) < 1e6 else f"{value:{plus}.4g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def format_spread(value: Spread | None) -> str:
    """Format mean ± standard deviation, both with the same number of decimals; a dash for None."""
    if value is None:
        return "–"
    mean = format_number(value.mean)
    decimals = len(mean.partition(".")[2]) if "e" not in mean else 4
    return mean + (f" ± {value.sd:,.{decimals}f}" if value.sd is not None else "")


def format_p_value(p: float | None) -> str:
    """Format a p value; a dash for None."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_interval(test: PairedTest | None) -> str:
    """Format the confidence interval of a test; a dash if there is none."""
    return (
        "–"
        if test is None or test.low is None
        else f"{format_number(test.low, True)} to {format_number(test.high, True)}"
    )


def headline(all_arms: Summaries) -> str:
    """Return the verdict on all arms in one sentence."""
    tests, comparison = all_arms.tests, all_arms.comparison
    if not tests:
        return (
            f"No verdict: there is only one arm, {next(iter(comparison.arms))}, so there is nothing to compare it with."
        )
    if comparison.pending:
        return f"No verdict yet: {comparison.pending}."
    if len(tests) == 1:
        return verdict(all_arms, next(iter(tests)))
    if comparison.primary in tests:
        others = {name: test for name, test in tests.items() if name != comparison.primary}
        return f"{verdict(all_arms, comparison.primary)} {_summary(all_arms, others)}"
    return _summary(all_arms, tests)


def _summary(all_arms: Summaries, tests: dict[str, PairedTest]) -> str:
    """Return the verdicts on several arms in one sentence."""
    comparison = all_arms.comparison
    by_verdict = {kind: [name for name, test in tests.items() if test.verdict == kind] for kind in get_args(Verdict)}
    parts = []
    for word in ("helps", "hurts"):
        if names := by_verdict[word]:
            arms = join_names([f"{name} ({format_number(tests[name].mean, True)})" for name in names])
            parts.append(f"{arms} {word if len(names) == 1 else word.removesuffix('s')}")
    if names := by_verdict["no difference found"]:
        parts.append(f"no difference was found for {join_names(names)}")
    if names := by_verdict["no verdict"]:
        parts.append(f"there is no verdict for {join_names(names)}")
    return f"Compared with {comparison.baseline} in {comparison.metric}: {'; '.join(parts)}."


def tuning_sentences(all_arms: Summaries) -> list[str]:
    """Return how the arms were tuned, or that they were not; empty if there is nothing to compare."""
    tune = all_arms.comparison.tune
    if len(all_arms.arms) < 2:
        return []
    if all_arms.comparison.matched_by is None:
        return ["The runs are not part of a study: whether their settings were tuned alike is not known."]
    if tune is None:
        return [
            "The arms were not tuned: no search chose their settings, such as the learning rate, which may suit one "
            "arm better than another."
        ]
    if "trials" not in tune:
        return ["The tuning of the arms is not finished."]
    counts = {arm: len(trials) for arm, trials in tune["trials"].items()}
    plan = tune["plans"][-1]
    keys = join_names(list(dict.fromkeys(key for grid in plan["grids"].values() for key in grid)))
    effort = (
        f"{next(iter(counts.values()))} trials each"
        if len(set(counts.values())) == 1
        else f"different numbers of trials ({', '.join(f'{arm} {count}' for arm, count in counts.items())})"
    )
    sentences = [
        f"The arms were tuned with {effort} of {keys}, by {plan['metric']} on {_describe_rows(plan['rows'])}, with "
        f"{format_seeds(plan['seeds'])}. The compared runs have other seeds."
    ]
    if len(tune["plans"]) > 1:
        changes = (
            f"The plan of the tuning was changed {len(tune['plans']) - 1} time(s) after {tune['plans'][0]['time']}"
        )
        scored = tune["plans"][-1].get("scored", 0)
        sentences.append(f"{changes}, the last time when {scored} runs had been scored." if scored else f"{changes}.")
    at_edge = {arm: keys for arm, keys in tune["at_edge"].items() if keys}
    if at_edge:
        listed = join_names([f"{arm} ({', '.join(keys)})" for arm, keys in at_edge.items()])
        sentences.append(f"The best value is at the edge of the range that was tried for {listed}.")
    for key, measured in sensitivity(all_arms.comparison).items():
        isolated = [
            scores for scores in measured if scores.has_numbers and len(scores.good) == 1 and not scores.at_edge
        ]
        if isolated:
            within = max(scores.tolerance for scores in isolated)
            sentences.append(
                f"For {join_names([scores.arm for scores in isolated])}, no other value of {key} that was tried scores "
                f"within {within:.2g} of the best: values in between may score higher."
            )
    return sentences


def _describe_rows(rows: dict[str, Any]) -> str:
    """Return where the rows of the tuning come from; earlier versions did not record how many there were."""
    if "rows" not in rows:
        return str(rows["origin"])
    dropped = rows["dropped"]
    return (
        f"{rows['origin']} ({rows['rows']:,} rows; dropped: {dropped['tested']:,} test rows, "
        f"{dropped['trained']:,} training records)"
    )


def join_names(names: list[str]) -> str:
    """Join names in the form `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def verdict(all_arms: Summaries, name: str) -> str:
    """Return the verdict on one arm and the numbers that support it, in one or two sentences."""
    comparison, test = all_arms.comparison, all_arms.tests[name]
    metric, baseline = comparison.metric, comparison.baseline
    assert baseline is not None  # without a baseline there is no test
    if test.verdict == "no verdict":
        difference = ""
        if test.mean is not None:
            difference = f" (the difference from {baseline} in {metric} is {format_number(test.mean, True)})"
        return f"{name}: no verdict, because {test.reason}{difference}."
    if test.p is None:
        return f"{name}: no difference from {baseline} found in {metric}: {test.reason} ({len(test.seeds)} seeds)."
    numbers = f"{format_number(test.mean, True)} over {len(test.seeds)} seeds, {_interval_and_p(test)}"
    if test.arms > 1:
        numbers += f" after correction for {test.arms} arms"
    if test.verdict == "no difference found":
        return (
            f"{name}: no difference from {baseline} found in {metric} ({numbers}). With this number of seeds and this "
            f"spread, only a true difference of at least ±{format_number(test.min_detectable)} would have been found "
            f"with a probability of at least {POWER:.0%}."
        )
    values_of_both = [all_arms.arms[arm].values for arm in (name, baseline)]
    means = [sum(values[seed] for seed in test.seeds) / len(test.seeds) for values in values_of_both]
    values_text = f"{format_number(means[0])} against {format_number(means[1])} for {baseline}"
    return f"{name} {test.verdict}: {metric} is {values_text} ({numbers})."


def _interval_and_p(test: PairedTest) -> str:
    text = f"95% interval {format_interval(test)}, p = {format_p_value(test.corrected_p)}"
    return text.replace("= <", "<")


def overfitting_sentences(all_arms: Summaries, past: Overfitting) -> list[str]:
    """Return sentences on overfitting: first the excluded runs, then one sentence for each measure and arm."""
    metric, baseline = all_arms.comparison.metric, all_arms.comparison.baseline
    sentences = [
        f"{name}: {format_seeds(arm.not_bracketed)} {'are' if len(arm.not_bracketed) > 1 else 'is'} excluded from "
        f"{metric} in this section: the metric needs evaluated checkpoints before and after the lowest validation loss "
        "and at the last step."
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
            arm_mean, baseline_mean = (
                format_number(sum(values[arm][seed] for seed in test.seeds) / len(test.seeds), True)
                for arm in (name, baseline)
            )
            outcome = {
                "helps": f"{name} does better than {baseline}",
                "hurts": f"{name} does worse than {baseline}",
                "no difference found": f"{name}: no difference from {baseline} found",
                "no verdict": f"{name}: no verdict on the difference from {baseline}",
            }[test.verdict]
            numbers = f"{format_number(test.mean, True)} over {len(test.seeds)} seed{'s' * (len(test.seeds) > 1)}"
            if test.p is not None:
                numbers += f", {_interval_and_p(test)}"
            elif test.reason:
                numbers += f"; {test.reason}"
            sentences.append(
                f"{outcome} in {measure} past the best validation loss: "
                f"change of {arm_mean} against {baseline_mean} (difference {numbers})."
            )
    return sentences


def cost_sentences(all_arms: Summaries) -> dict[str, str]:
    """Return for each arm a sentence on its cost per corpus token, relative to the baseline."""
    sentences = {}
    for name, arm in all_arms.arms.items():
        if name == all_arms.comparison.baseline or not (arm.flops_ratio or arm.seconds_ratio):
            continue
        parts = [f"{arm.flops_ratio:.2f} times the FLOPs"] if arm.flops_ratio else []
        for ratio, unit in ((arm.seconds_ratio, "seconds"), (arm.processor_ratio, "processor seconds")):
            if ratio:
                parts.append(
                    f"{ratio.mean:.2f} times the {unit}"
                    + (f" ({ratio.low:.2f} to {ratio.high:.2f} by seed)" if ratio.seeds > 1 else "")
                )
        sentences[name] = f"Per corpus token, {name} needs {join_names(parts)} of {all_arms.comparison.baseline}."
    return sentences


def run_rows(summary: Summary) -> list[tuple[str, str, str, str, str]]:
    """Return a table row for each run of an arm: seed, state, step, value of the metric, folder."""
    rows = [
        (
            str(seed),
            run.status.get("status", "unknown"),
            f"{run.last.get('step', 0):,}",
            format_number(summary.values.get(seed)),
            str(run.record or run.folder),
        )
        for seed, run in summary.arm.runs.items()
    ]
    return rows + [(str(seed), "missing", "–", "–", folder) for seed, folder in summary.arm.missing_runs.items()]
