"""Sentences of the report: the verdict, the cost of each arm, and the caveats."""

from typing import get_args

from pretrain.report.arms import NOT_SET, STUDY, differing_keys, flatten, shorten, training_settings
from pretrain.report.overfitting import Overfitting
from pretrain.report.runs import finetune_settings, parse_scoring_version
from pretrain.report.sensitivity import WITHIN, sensitivity
from pretrain.report.statistics import POWER, PairedTest, Verdict, format_seeds
from pretrain.report.summary import Spread, Summaries, Summary, spread
from pretrain.tasks.directions import VALIDATION

CLOSE = 0.02
"""Largest relative difference in tokens, FLOPs or seconds at which arms count as matched."""
FEW_SEEDS = 6
"""Fewest seeds with which a test of only the signs can reach p < 5%: all 6 signs agree in 2 of 2^6 outcomes."""
UNEVEN = 1.25
"""Ratio between the seconds of two seeds of an arm above which the report warns that seconds are unreliable."""
AMOUNTS = {"tokens": "corpus tokens", "flops": "FLOPs", "seconds": "seconds", "processor_seconds": "processor seconds"}


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
            "The arms were not tuned: all have the settings of the base, such as its learning rate, which may suit one "
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
        f"The arms were tuned with {effort} of {keys}, by {plan['metric']} on {plan['rows']['origin']}, with "
        f"{format_seeds(plan['seeds'])}. The compared runs have other seeds."
    ]
    if len(tune["plans"]) > 1:
        sentences.append(
            f"The plan of the tuning was changed {len(tune['plans']) - 1} time(s) after {tune['plans'][0]['time']}."
        )
    at_edge = {arm: keys for arm, keys in tune["at_edge"].items() if keys}
    if at_edge:
        listed = join_names([f"{arm} ({', '.join(keys)})" for arm, keys in at_edge.items()])
        sentences.append(f"The best value is at the edge of the range that was tried for {listed}.")
    for key, measured in sensitivity(all_arms.comparison).items():
        if isolated := [scores.arm for scores in measured if len(scores.good) == 1 and not scores.at_edge]:
            sentences.append(
                f"For {join_names(isolated)}, no other value of {key} that was tried scores within {WITHIN:g} of the "
                "best: values in between may score higher."
            )
    return sentences


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


def caveats(all_arms: Summaries) -> list[str]:
    """Return the caveats that a reader must know before relying on the verdict."""
    parts = (_power, _scorings, _missing, _collapses, _metric, _matching, _calibration, _differences, _seconds)
    return [sentence for part in parts for sentence in part(all_arms)]


def _power(all_arms: Summaries) -> list[str]:
    """Report how the pilot has determined the number of seeds."""
    power = all_arms.comparison.power
    if power is None or "seeds" not in power:
        return []
    count = len(power["seeds"])
    deciding = power["deciding"]
    which = "standard deviation" if deciding == power.get("primary") else "largest standard deviation"
    text = (
        f"The number of seeds, {count}, follows from a pilot. Its {format_seeds(power['pilot'])} are excluded from "
        f"this report. The {which} of the differences between an arm and the baseline was "
        f"{format_number(power['sd'][deciding])} ({deciding})."
    )
    if power["limit_reached"]:
        return [
            f"{text} The study file allows at most {count} seeds. They find a true difference of "
            f"{format_number(power['detectable'])} with a probability of {POWER:.0%}, but the difference worth finding "
            f"is {format_number(power['detect'])}."
        ]
    return [
        f"{text} With this spread, {count} seeds find a true difference of {format_number(power['detect'])} with a "
        f"probability of {POWER:.0%}."
    ]


def _scorings(all_arms: Summaries) -> list[str]:
    """Name the runs whose scores are not comparable because they come from a different scoring version."""
    metric = all_arms.comparison.metric
    if all_arms.settings is None or metric.task == VALIDATION:
        return []
    version = parse_scoring_version(all_arms.settings)
    incomparable = {
        run.folder.name: versions
        for run in all_arms.comparison.runs
        if (versions := metric.scoring_versions(run)) and version not in versions
    }
    if not incomparable:
        return []
    excluded = ", ".join(
        f"{name} (version {', '.join(map(str, sorted(versions)))})" for name, versions in incomparable.items()
    )
    return [
        f"Scores of {metric} come from different versions of the scoring: version {version} is compared, excluding "
        f"{excluded}. Evaluate the excluded runs again: python launcher/evaluate.py RUN_DIR."
    ]


def _missing(all_arms: Summaries) -> list[str]:
    metric = all_arms.comparison.metric
    sentences = []
    for arm in all_arms.arms.values():
        planned = arm.arm.planned
        if len(arm.values) == planned:
            continue
        reasons = [f"seed {seed} is missing" for seed in arm.arm.missing_runs]
        for seed, run in arm.arm.runs.items():
            if not run.finished:
                reasons.append(
                    f"seed {seed} is {run.status.get('status', 'not started')} at step {run.last.get('step', 0)}"
                )
            elif seed not in arm.values:
                reasons.append(
                    f"seed {seed} has no {metric} at its last step"
                    + (", or only under other settings" if metric.results(run) else "")
                )
        sentences.append(f"{arm.arm.name}: {len(arm.values)} of {planned} runs count ({'; '.join(reasons)}).")
    if all_arms.comparison.pending:
        sentences.append(
            "There is no p value, interval or verdict before all planned runs are trained and evaluated. If a run can "
            "never finish, remove its seed from `seeds` in the study file and start the study again."
        )
    return sentences


def _collapses(all_arms: Summaries) -> list[str]:
    names = [f"{arm.arm.name} ({format_seeds(arm.collapsed)})" for arm in all_arms.arms.values() if arm.collapsed]
    return (
        [
            f"The embeddings of {join_names(names)} have collapsed: unrelated views are as close as pairs, or hardly "
            "any prediction finds its target although pairs are close. A low JEPA loss of these runs means nothing."
        ]
        if names
        else []
    )


def _metric(all_arms: Summaries) -> list[str]:
    comparison = all_arms.comparison
    sentences = []
    if not comparison.metric_origin.startswith("chosen"):
        sentences.append(f"The metric {comparison.metric} was {comparison.metric_origin}.")
    if comparison.primary is not None:
        sentences.append(
            f"{comparison.primary} was named as the primary comparison in {STUDY}, so its p is not corrected for the "
            "other arms."
        )
    if all_arms.num_tested_arms > 1:
        other, their = ("other ", "their ") if comparison.primary is not None else ("", "")
        sentences.append(
            f"{all_arms.num_tested_arms} {other}arms are compared with one baseline, and {their}p and intervals are "
            "corrected for that (Holm). "
            "Other metrics are not tested, except in a section on overfitting if there is one; their differences are "
            "descriptive only."
        )
    seeds = min((len(test.seeds) for test in all_arms.tests.values()), default=FEW_SEEDS)
    if 1 < seeds < FEW_SEEDS and not comparison.pending:
        sentences.append(
            f"{seeds} seeds are few: the test assumes normally distributed differences, and so few seeds cannot show "
            "that they are. A test without this assumption, which uses only the signs of the differences, needs "
            f"{FEW_SEEDS} seeds."
        )
    return sentences


def _matching(all_arms: Summaries) -> list[str]:
    """Report which amounts are equal in all arms, and which are not. Processor seconds replace seconds if known."""
    if len(all_arms.arms) < 2:
        return []
    has_processor_seconds = all(arm.consumed("processor_seconds") for arm in all_arms.arms.values())
    amounts = ("tokens", "flops", "processor_seconds" if has_processor_seconds else "seconds")
    equal: list[str] = []
    different: dict[str, str] = {}
    for amount in amounts:
        name = AMOUNTS[amount]
        means = [consumed.mean for arm in all_arms.arms.values() if (consumed := arm.consumed(amount))]
        if len(means) < len(all_arms.arms):
            continue
        difference = max(means) / min(means) - 1
        if difference > CLOSE:
            different[amount] = f"{name} (by up to {difference:.0%})"
        else:
            equal.append(name)
    matched_by = all_arms.comparison.matched_by
    if matched_by == "seconds" and "seconds" not in amounts:
        matched_by = "processor_seconds"
    sentences: list[str] = []
    if matched_by in different:
        name = AMOUNTS[matched_by]
        sentences.append(f"The study is matched by {name}, but the arms differ in {name}; see the table.")
    if different:
        equal_text = f"are equal in {join_names(equal)}, but " if equal else ""
        sentences.append(
            f"The arms {equal_text}differ in {join_names(list(different.values()))}; "
            "the verdict holds for this matching only."
        )
    return sentences


def _calibration(all_arms: Summaries) -> list[str]:
    """Report the measured speeds from which the budgets follow."""
    comparison = all_arms.comparison
    parts = []
    for name, entry in comparison.calibration.items():
        ratio = entry["speed_ratio"]
        equal = "; counts as equally fast" if ratio["low"] <= 1 <= ratio["high"] else ""
        parts.append(f"{name} {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}{equal})")
    if not parts:
        return []
    units = join_names(list(dict.fromkeys(entry["unit"] for entry in comparison.calibration.values())))
    return [
        f"The budgets follow from speeds that were measured in {units} before the runs. Median and range over the "
        f"rounds, relative to {comparison.baseline}: {join_names(parts)}."
    ]


def _differences(all_arms: Summaries) -> list[str]:
    comparison = all_arms.comparison
    first_runs = [arm.first for arm in comparison.arms.values() if arm.first]
    settings = [
        values | flatten(finetune_settings(run.config), "finetuning of ")
        for values, run in zip(training_settings(first_runs), first_runs, strict=True)
    ]
    sentences = []
    other_keys = [key for key in differing_keys(settings) if not key.startswith("objective.")]
    if other_keys:
        descriptions = [
            f"{key} ({', '.join(dict.fromkeys(shorten(values.get(key, NOT_SET)) for values in settings))})"
            for key in other_keys
        ]
        sentences.append(f"Besides the objective, arms differ in {join_names(descriptions)}.")
    environments = [run.environment for run in comparison.runs if run.environment]
    corpora = {
        str([environment.get("data", {}).get(part) for part in ("corpus", "tokenizer")]) for environment in environments
    }
    if len(corpora) > 1:
        sentences.append(
            "The runs did not read the same corpus with the same tokenizer: their losses are not comparable, "
            "and their scores should be compared with care."
        )
    for run in comparison.runs:
        if lineage := run.environment.get("lineage"):
            steps = ", then ".join(f"step {entry['step']:,} of {entry['run']}" for entry in lineage)
            sentences.append(f"{run.folder.name} branches from {steps} ({'; '.join(lineage[-1]['differences'])}).")
    machines = {
        f"{environment.get('ranks')} ranks on {environment.get('device')}, "
        f"{environment.get('threads_per_rank')} threads each"
        for environment in environments
    }
    if len(machines) > 1:
        sentences.append(
            f"The runs used different machines ({'; '.join(sorted(machines))}): their seconds are not comparable."
        )
    return sentences


def _seconds(all_arms: Summaries) -> list[str]:
    """Warn if the seconds of an arm's seeds differ too much to be reliable."""
    speeds = [
        spread(run.last["seconds"] / run.last["tokens"] for run in arm.finished) for arm in all_arms.arms.values()
    ]
    processor_times = all(arm.consumed("processor_seconds") for arm in all_arms.arms.values())
    recorded = "processor seconds or " if processor_times else ""
    unevenness = max((speed.high / speed.low for speed in speeds if speed), default=1.0)
    return (
        [
            f"Some seeds took up to {unevenness:.1f} times as long as other seeds of the same arm: the machine did "
            f"other work too, so compare {recorded}FLOPs rather than seconds."
        ]
        if unevenness > UNEVEN
        else []
    )


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
