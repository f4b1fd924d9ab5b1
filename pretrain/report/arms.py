"""What is compared with what: arms, each with a run per seed, from a study or from run directories."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.console import UserError
from pretrain.report.runs import Metric, Run, declared_direction, is_run, known_metrics, read_run
from pretrain.tasks.directions import VALIDATION

STUDY = "study.json"
OF_TRAINING = ("data.lm_views", "data.train_end_token", "data.sequence_length")
"""Keys of `data` that decide the training besides the shards."""
WITHOUT_EFFECT = ("name", "seed", "output_dir", "monitor", "checkpoint", "evaluation")
"""Sections that do not make an arm: they change nothing of what is trained."""
NOT_SET = "none"
LONGEST_VALUE = 30


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone."""

    name: str
    runs: dict[int, Run]
    """By seed."""
    missing_runs: dict[int, str]
    """Planned runs that are not there: the folder of each."""
    flops_per_token: float | None = None
    """As its study planned it."""

    @property
    def planned(self) -> int:
        """Number of planned runs."""
        return len(self.runs) + len(self.missing_runs)

    @property
    def first(self) -> Run | None:
        """A run that stands for the arm: the finished one of the lowest seed, or any."""
        return min(self.runs.values(), key=lambda run: (not run.finished, run.seed), default=None)


@dataclass(frozen=True)
class Comparison:
    """Everything that the report tells about."""

    title: str
    arms: dict[str, Arm]
    """The baseline first."""
    baseline: str | None
    """None where there is one arm."""
    metric: Metric
    metric_origin: str
    """Who chose the metric: the end of a sentence."""
    matched_by: str | None
    """What the study gave all arms the same amount of: tokens, flops or seconds."""

    @property
    def runs(self) -> list[Run]:
        """Runs of all arms."""
        return [run for arm in self.arms.values() for run in arm.runs.values()]

    @property
    def others(self) -> list[Arm]:
        """All arms but the baseline."""
        return [arm for arm in self.arms.values() if arm.name != self.baseline]


def read_comparison(paths: list[Path], baseline: str | None, metric: str | None) -> Comparison:
    """A study folder, or run directories. `baseline` and `metric` choose otherwise than those do. Raises UserError."""
    studies = [path for path in paths if (path / STUDY).is_file()]
    if studies and len(paths) > 1:
        raise UserError(f"{studies[0]} is a study: report on it alone, or name run directories only")
    if studies:
        return _read_study(studies[0], baseline, metric)
    for path in paths:
        if not is_run(path):
            raise UserError(f"{path} is no run directory, which holds config.yaml, and no study, which holds {STUDY}")
    arms = group([read_run(path) for path in paths])
    runs = [run for arm in arms for run in arm.runs.values()]
    if metric is None:
        chosen, origin = (
            _default_metric(runs),
            "not chosen in advance: it is the first one of the first task that was evaluated",
        )
    else:
        chosen, origin = (
            Metric.parse(metric, runs),
            "named on the command line; whether before the runs were seen, only you know",
        )
    title = paths[0].resolve().name if len(paths) == 1 else f"{len(runs)} runs of {paths[0].resolve().parent.name}"
    return _comparison(title, arms, baseline, chosen, origin, None)


def _read_study(folder: Path, baseline: str | None, given: str | None) -> Comparison:
    path = folder / STUDY
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        arms = [_study_arm(folder, name, arm) for name, arm in study["arms"].items()]
        title, matched_by, named = str(study["name"]), study["matched_by"], study["baseline"]
        planned = Metric(study["metric"]["task"], study["metric"]["name"], bool(study["metric"]["higher_is_better"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no study: {type(error).__name__} {error}") from None
    runs = [run for arm in arms for run in arm.runs.values()]
    metric = Metric.parse(given, runs, planned) if given else planned
    if metric != planned:
        origin = f"named on the command line; the study planned {planned}"
    else:
        origin = f"chosen in {STUDY}"
        if any(run.results for run in runs) and not any(metric.results(run) or metric.curve(run, None) for run in runs):
            raise UserError(
                f"{path}: no run has the metric {metric}; there are {known_metrics(runs)}. Name one with --metric, or mend the study "
                "file and start it again: what has run stays"
            )
    return _comparison(title, arms, baseline or named, metric, origin, matched_by)


def _study_arm(folder: Path, name: str, arm: dict[str, Any]) -> Arm:
    paths = {int(seed): folder / path for seed, path in arm["runs"].items()}
    return Arm(
        name,
        {seed: read_run(path) for seed, path in sorted(paths.items()) if is_run(path)},
        {seed: str(path) for seed, path in sorted(paths.items()) if not is_run(path)},
        arm.get("flops_per_token"),
    )


def _comparison(
    title: str, arms: list[Arm], baseline: str | None, metric: Metric, origin: str, matched_by: str | None
) -> Comparison:
    by_name = {arm.name: arm for arm in arms}
    if baseline is None and len(arms) > 1:
        plain = [arm.name for arm in arms if arm.first and arm.first.objective == "next_token"]
        if len(plain) != 1:
            raise UserError(
                f"which arm is the baseline? {len(plain)} arms have objective.name=next_token; name one with --baseline: "
                + "; ".join(by_name)
            )
        baseline = plain[0]
    if baseline is not None and baseline not in by_name:
        raise UserError(f"there is no arm {baseline!r} to be the baseline; there are: {'; '.join(by_name)}")
    if len(arms) == 1:
        baseline = None
    order = sorted(by_name, key=lambda name: name != baseline)
    return Comparison(title, {name: by_name[name] for name in order}, baseline, metric, origin, matched_by)


def group(runs: list[Run]) -> list[Arm]:
    """Runs as arms, by what differs in their configurations but for seed, name and what changes nothing. Raises UserError for a seed twice."""
    settings = training_settings(runs)
    keys = differing_keys(settings)
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run, values in zip(runs, settings, strict=True):
        groups.setdefault(tuple(values.get(key, NOT_SET) for key in keys), []).append(run)
    arms = []
    for name, members in zip(_names([members[0] for members in groups.values()]), groups.values(), strict=True):
        by_seed: dict[int, Run] = {}
        for run in members:
            if run.seed in by_seed:
                raise UserError(
                    f"{by_seed[run.seed].folder} and {run.folder} are the same arm with the same seed, {run.seed}: leave one out"
                )
            by_seed[run.seed] = run
        arms.append(Arm(name, dict(sorted(by_seed.items())), {}))
    return arms


def _names(first_runs: list[Run]) -> list[str]:
    """The objective, and what tells an arm from others of the same objective; no name twice."""
    names: list[str] = []
    settings = training_settings(first_runs)
    for run, mine in zip(first_runs, settings, strict=True):
        twins = [values for other, values in zip(first_runs, settings, strict=True) if other.objective == run.objective]
        words = [
            f"{key.removeprefix('objective.')}={shorten(mine[key])}" for key in differing_keys(twins) if key in mine
        ]
        name = " ".join([run.objective, *words])
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


def shorten(value: str) -> str:
    """The beginning of a long value."""
    return value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}…"


def differing_keys(settings: list[dict[str, str]]) -> list[str]:
    """Keys, in order, whose values are not the same everywhere."""
    keys = dict.fromkeys(key for values in settings for key in values)
    return [key for key in keys if len({values.get(key, NOT_SET) for values in settings}) > 1]


def training_settings(runs: list[Run]) -> list[dict[str, str]]:
    """Return what decides the training of each run, as dotted keys.

    Runs that recorded the same shards, tokenizer and weights have the keys of `data` in common, wherever their corpora stood.
    """
    data_of: dict[str, dict[str, str]] = {}
    found = []
    for run in runs:
        settings = flatten(run.config)
        if read := run.environment.get("data"):
            data = {key: value for key, value in settings.items() if key.startswith("data.") and key not in OF_TRAINING}
            others = {key: value for key, value in settings.items() if key not in data}
            settings = data_of.setdefault(json.dumps(read, sort_keys=True), data) | others
        found.append(settings)
    return found


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys of what decides the training, with their values as text."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if prefix or key not in WITHOUT_EFFECT:
            flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


def _default_metric(runs: list[Run]) -> Metric:
    for run in runs:
        for result in run.results:
            for name in result["metrics"]:
                if (found := declared_direction(result["task"], name, runs)) in ("higher", "lower"):
                    return Metric(result["task"], name, found == "higher")
    return Metric(VALIDATION, "loss/lm", False)
