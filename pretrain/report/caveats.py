"""The caveats that a reader of the report must know before relying on the verdict."""

from typing import Any

from pretrain.report.arms import NOT_SET, differing_keys, flatten, shorten, training_settings
from pretrain.report.narrative import format_number, format_p_value, join_names
from pretrain.report.runs import finetune_settings, parse_scoring_version
from pretrain.report.statistics import ALPHA, POWER, format_seeds, sign_flip_p_value
from pretrain.report.summary import Summaries, spread
from pretrain.tasks.directions import VALIDATION

CLOSE = 0.02
"""Largest relative difference in tokens, FLOPs or seconds at which arms count as matched."""
FEW_SEEDS = 6
"""Fewest seeds with which a test of only the signs can reach p < 5%: all 6 signs agree in 2 of 2^6 outcomes."""
UNEVEN = 1.25
"""Ratio between the seconds of two seeds of an arm above which the report warns that seconds are unreliable."""
AMOUNTS = {"tokens": "corpus tokens", "flops": "FLOPs", "seconds": "seconds", "processor_seconds": "processor seconds"}


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
    planned = max(arm.planned for arm in all_arms.comparison.arms.values())
    if planned < count:
        text += f" The study file now lists {planned} of the {count} seeds."
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
            "never finish, remove its seed from the study file and start the study again."
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
    sentences += _decisions(all_arms)
    if comparison.primary is not None:
        sentences.append(
            f"{comparison.primary} is the primary comparison: it is tested first, without a correction, and other arms "
            "are tested only if it differs from the baseline."
        )
    if all_arms.num_tested_arms > 1:
        other, their = ("other ", "their ") if comparison.primary is not None else ("", "")
        sentences.append(
            f"{all_arms.num_tested_arms} {other}arms are compared with one baseline, and {their}p and intervals are "
            "corrected for that (Holm). "
            "Other metrics are not tested, except in a section on overfitting if there is one; their differences are "
            "descriptive only."
        )
    sentences += _outliers(all_arms)
    seeds = min((len(test.seeds) for test in all_arms.tests.values()), default=FEW_SEEDS)
    if 1 < seeds < FEW_SEEDS and not comparison.pending:
        sentences.append(
            f"{seeds} seeds are few: the test assumes normally distributed differences, and so few seeds cannot show "
            "that they are. A test without this assumption, which uses only the signs of the differences, needs "
            f"{FEW_SEEDS} seeds."
        )
    return sentences


def _decisions(all_arms: Summaries) -> list[str]:
    """Report what was decided when scores already existed."""
    sentences = []
    before = None
    for decision in all_arms.comparison.decisions:
        keys = [key for key in decision if key not in ("time", "scored")]
        changed = [key for key in keys if before is None or before.get(key, decision[key]) != decision[key]]
        if decision["scored"]:
            named = ", ".join(f"{key} {_shown(decision[key])}" for key in changed)
            runs = f"{decision['scored']} run{'s' * (decision['scored'] > 1)}"
            sentences.append(f"Decided on {decision['time'][:10]}, when {runs} had already been scored: {named}.")
        before = decision
    return sentences


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


def _outliers(all_arms: Summaries) -> list[str]:
    """Warn of differences that are significant only because the test assumes a normal distribution."""
    baseline = all_arms.baseline
    sentences = []
    for name, test in all_arms.tests.items():
        if baseline is None or test.verdict not in ("helps", "hurts") or len(test.seeds) < FEW_SEEDS:
            continue
        differences = [all_arms.arms[name].values[seed] - baseline.values[seed] for seed in test.seeds]
        p = sign_flip_p_value(differences)
        if p is not None and p >= ALPHA:
            sentences.append(
                f"{name}: the verdict depends on the assumption that the differences are normally distributed. A test "
                f"that assumes only that they are symmetric has p = {format_p_value(p)}."
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
