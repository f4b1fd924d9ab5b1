"""Arms of a comparison, each with one run per seed, read from a study or from run directories."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.utils.console import UserError
from pretrain.report.records import extract, find_run, record_path
from pretrain.report.runs import Metric, Run, declared_direction, is_run, known_metrics, read_run
from pretrain.run_folder import loss_terms
from pretrain.tasks.directions import VALIDATION

STUDY = "study.json"
"""File that makes a folder a study."""
RUNS_ARCHIVE = "runs.tar.xz"
"""File in a study folder with the records of its runs, in place of their directories."""
TRAINING_DATA_KEYS = ("data.lm_views", "data.train_end_token", "data.sequence_length")
"""Keys of `data` that affect the training and do not follow from the shards."""
KEYS_IGNORED_BETWEEN_ARMS = ("name", "seed", "output_dir", "monitor", "checkpoint", "export", "evaluation")
"""Keys and sections that do not distinguish arms, because they do not change what is trained."""
NOT_SET = "none"
"""Text for a key that a configuration does not have."""
LONGEST_VALUE = 30
"""Number of characters after which a value is cut off."""


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seed."""

    name: str
    runs: dict[int, Run]
    """Runs by seed."""
    missing_runs: dict[int, str]
    """Folders of planned runs that do not exist, by seed."""
    flops_per_token: float | None = None
    """FLOPs per corpus token, as the study planned them."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Changes of the base by which the study defines the arm; with the best values, if it is tuned."""

    @property
    def planned(self) -> int:
        """Number of planned runs."""
        return len(self.runs) + len(self.missing_runs)

    @property
    def first(self) -> Run | None:
        """Representative run: the finished run of the lowest seed, or else the run of the lowest seed."""
        return min(self.runs.values(), key=lambda run: (not run.finished, run.seed), default=None)


@dataclass(frozen=True)
class Comparison:
    """Subject of a report: its arms, baseline and metric."""

    title: str
    arms: dict[str, Arm]
    """Arms by name, the baseline first."""
    baseline: str | None
    """Name of the baseline; None if there is only one arm."""
    metric: Metric
    metric_origin: str
    """Text on how the metric was chosen; it completes "The metric M was ..."."""
    matched_by: str | None
    """Amount that is equal in all arms of the study: tokens, flops, seconds or none; None if there is no study."""
    primary: str | None = None
    """Arm of the primary comparison."""
    decisions: list[dict[str, Any]] = field(default_factory=list)
    """Baseline, metric and primary arm with the time at which they were fixed, as in study.json."""
    tune: dict[str, Any] | None = None
    """Tuning of the arms as study.json records it; None if they were not tuned."""
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Measured speed of each arm relative to the baseline, as in study.json. It is empty if seconds are not matched, or
    if an earlier version measured the speeds."""
    pending: str = ""
    """Reason why the study is unfinished and has no verdict yet; empty if it is finished, or if there is no study."""
    power: dict[str, Any] | None = None
    """The pilot and the number of seeds that follows from it, as in study.json; None if the study has no pilot."""

    @property
    def runs(self) -> list[Run]:
        """Runs of all arms."""
        return [run for arm in self.arms.values() for run in arm.runs.values()]

    @property
    def loss_terms(self) -> list[str]:
        """Terms of the loss that the runs recorded, in the order of their objectives, the baseline's terms first."""
        return loss_terms(line for run in self.runs for line in run.metrics)

    @property
    def others(self) -> list[Arm]:
        """All arms except the baseline."""
        return [arm for arm in self.arms.values() if arm.name != self.baseline]


def read_comparison(paths: list[Path], baseline: str | None, metric: str | None) -> Comparison:
    """Read a study folder or run directories; `baseline` and `metric` override the defaults. Raises UserError."""
    studies = [path for path in paths if (path / STUDY).is_file()]
    if studies and len(paths) > 1:
        raise UserError(f"{studies[0]} is a study; pass it as the only path, or pass only run directories")
    if studies:
        return _read_study(studies[0], baseline, metric)
    for path in paths:
        if not is_run(path):
            raise UserError(
                f"{path} is neither a run directory (it has no config.yaml) nor a study (it has no {STUDY}); "
                "correct the path"
            )
    arms = group([read_run(path) for path in paths])
    runs = [run for arm in arms for run in arm.runs.values()]
    if metric is None:
        chosen = _default_metric(runs)
        origin = (
            "not chosen in advance: it is the first reported metric with a declared direction, "
            "or else the validation loss"
        )
    else:
        chosen = Metric.parse(metric, runs)
        origin = "named on the command line; nothing records whether it was chosen before the runs were seen"
    title = paths[0].resolve().name if len(paths) == 1 else f"{len(runs)} runs of {paths[0].resolve().parent.name}"
    return replace(_comparison(title, arms, baseline, chosen, origin, None), pending=_pending_studies(paths))


def _pending_studies(run_dirs: list[Path]) -> str:
    """Return the reason why a study that contains one of the runs is unfinished; empty if there is none."""
    folders = {run_dir.resolve().parent for run_dir in run_dirs}
    for folder in sorted(folder for folder in folders if (folder / STUDY).is_file()):
        if pending := _read_study(folder, None, None).pending:
            return f"{pending} in {folder}, the study of these runs"
    return ""


def _read_study(folder: Path, baseline: str | None, metric_text: str | None) -> Comparison:
    path = folder / STUDY
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        if "arms" not in study and study.get("tune"):
            raise UserError(
                f"{folder}: the tuning is not finished, so there is nothing to compare yet; for the trials, use "
                f"{folder / 'tuning'}"
            )
        runs_folder = extract(folder / RUNS_ARCHIVE) if (folder / RUNS_ARCHIVE).is_file() else folder
        power = _power(study)
        # The seeds of the pilot are not compared once they have determined the number of seeds.
        excluded = power["pilot"] if power and "seeds" in power else []
        arms = [_study_arm(folder, runs_folder, name, arm, excluded) for name, arm in study["arms"].items()]
        title, matched_by, study_baseline = str(study["name"]), study["matched_by"], study["baseline"]
        speeds = {name: entry for name, entry in study.get("calibration", {}).items() if "speed_ratio" in entry}
        planned = Metric(study["metric"]["task"], study["metric"]["name"], bool(study["metric"]["higher_is_better"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a valid study file: {type(error).__name__} {error}; start the study again to rewrite it"
        ) from None
    runs = [run for arm in arms for run in arm.runs.values()]
    metric = Metric.parse(metric_text, runs, planned) if metric_text else planned
    if metric != planned:
        origin = f"named on the command line; the study planned {planned}"
    else:
        origin = f"chosen in {STUDY}"
        if any(run.results for run in runs) and not any(metric.results(run) or metric.curve(run, None) for run in runs):
            raise UserError(
                f"{path}: no run has the metric {metric}; available: {known_metrics(runs)}. Choose one with --metric, "
                "or fix metric in the study file and start the study again; finished runs are kept"
            )
    comparison = _comparison(title, arms, baseline or study_baseline, metric, origin, matched_by)
    calibration = {
        name: speeds[name] for name in comparison.arms if speeds.get(name, {}).get("baseline") == comparison.baseline
    }
    return replace(
        comparison,
        calibration=calibration,
        primary=study.get("primary") if comparison.baseline == study_baseline else None,
        decisions=study.get("decisions", []),
        tune=study.get("tune") if study.get("tuned", True) else None,
        pending=_pending(arms, planned, power),
        power=power,
    )


def _power(study: dict[str, Any]) -> dict[str, Any] | None:
    """Return the choice of the number of seeds from a pilot; None if the study lists other seeds than the chosen ones.

    A study may list fewer seeds than were chosen, if some runs never finish.
    """
    power: dict[str, Any] | None = study.get("power")
    if power and "seeds" in power:
        seeds = {int(seed) for arm in study["arms"].values() for seed in arm["runs"]}
        further = seeds - {*power["pilot"]}
        if not further or not further <= {*power["seeds"]}:
            return None
    return power


def _pending(arms: list[Arm], metric: Metric, power: dict[str, Any] | None) -> str:
    """Return the reason why a study is unfinished; empty if all its planned runs are trained and evaluated."""
    planned = sum(arm.planned for arm in arms)
    missing = planned - sum(metric.is_evaluated(run) for arm in arms for run in arm.runs.values())
    runs = "runs is" if missing == 1 else "runs are"
    if power and "seeds" not in power:
        return f"the number of seeds follows from the pilot, of which {missing} of {planned} {runs} missing"
    return f"{missing} of {planned} {runs} missing" if missing else ""


def _study_arm(folder: Path, runs_folder: Path, name: str, arm: dict[str, Any], excluded: list[int]) -> Arm:
    """Read the runs of an arm from their directories in `runs_folder` or from the records of the study in `folder`."""
    paths = {int(seed): path for seed, path in arm["runs"].items() if int(seed) not in excluded}
    runs: dict[int, Run] = {}
    missing: dict[int, str] = {}
    for seed, path in sorted(paths.items()):
        run_dir, record = runs_folder / path, record_path(folder, Path(path).name)
        found = find_run(run_dir, record)
        if found is None:
            missing[seed] = str(run_dir)
        else:
            runs[seed] = read_run(found) if found == run_dir else replace(read_run(found), record=record)
    return Arm(name, runs, missing, arm.get("flops_per_token"), arm.get("overrides", {}))


def _comparison(
    title: str, arms: list[Arm], baseline: str | None, metric: Metric, origin: str, matched_by: str | None
) -> Comparison:
    by_name = {arm.name: arm for arm in arms}
    if baseline is None and len(arms) > 1:
        next_token_arms = [arm.name for arm in arms if arm.first and arm.first.objective == "next_token"]
        if len(next_token_arms) != 1:
            corpora = {
                str(arm.first.environment.get("data", {}).get("corpus")): str(arm.first.config["data"]["path"])
                for arm in arms
                if arm.first
            }
            if len(corpora) > 1:
                raise UserError(
                    f"the runs were trained on different corpora ({', '.join(corpora.values())}), so none is the "
                    "baseline: report each run separately, or choose the baseline with --baseline"
                )
            raise UserError(
                f"the baseline is not clear: {len(next_token_arms)} arms have objective.name=next_token; "
                f"choose one with --baseline: {'; '.join(by_name)}"
            )
        baseline = next_token_arms[0]
    if baseline is not None and baseline not in by_name:
        raise UserError(f"the baseline {baseline!r} is not an arm; choose one of: {'; '.join(by_name)}")
    if len(arms) == 1:
        baseline = None
    order = sorted(by_name, key=lambda name: name != baseline)
    return Comparison(title, {name: by_name[name] for name in order}, baseline, metric, origin, matched_by)


def group(runs: list[Run]) -> list[Arm]:
    """Group runs into arms: runs with the same training settings, apart from the seed, form one arm.

    Raises UserError if an arm has two runs with the same seed.
    """
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
                    f"{by_seed[run.seed].folder} and {run.folder} have the same training settings and the same seed, "
                    f"{run.seed}; pass only one of them"
                )
            by_seed[run.seed] = run
        arms.append(Arm(name, dict(sorted(by_seed.items())), {}))
    return arms


def _names(first_runs: list[Run]) -> list[str]:
    """Return a unique name for each arm: its objective, and the settings that differ between arms of that objective."""
    names: list[str] = []
    settings = training_settings(first_runs)
    for run, run_settings in zip(first_runs, settings, strict=True):
        same_objective = [
            values for other, values in zip(first_runs, settings, strict=True) if other.objective == run.objective
        ]
        differences = [
            f"{key.removeprefix('objective.')}={shorten(run_settings[key])}"
            for key in differing_keys(same_objective)
            if key in run_settings
        ]
        name = " ".join([run.objective, *differences])
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


def shorten(value: str) -> str:
    """Return a value, cut off if it is long."""
    return value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}…"


def differing_keys(settings: list[dict[str, str]]) -> list[str]:
    """Return the keys, in order, whose values are not the same in all settings."""
    keys = dict.fromkeys(key for values in settings for key in values)
    return [key for key in keys if len({values.get(key, NOT_SET) for values in settings}) > 1]


def training_settings(runs: list[Run]) -> list[dict[str, str]]:
    """Return the settings that determine the training of each run, as dotted keys.

    If runs recorded the same shards, tokenizer and weights, their `data` settings count as equal except for
    TRAINING_DATA_KEYS. Their corpora may be in different folders.
    """
    data_by_record: dict[str, dict[str, str]] = {}
    settings_of_runs = []
    for run in runs:
        settings = flatten(run.config)
        if recorded := run.environment.get("data"):
            data = {
                key: value
                for key, value in settings.items()
                if key.startswith("data.") and key not in TRAINING_DATA_KEYS
            }
            others = {key: value for key, value in settings.items() if key not in data}
            settings = data_by_record.setdefault(json.dumps(recorded, sort_keys=True), data) | others
        settings_of_runs.append(settings)
    return settings_of_runs


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a configuration to dotted keys and text values, without the top-level KEYS_IGNORED_BETWEEN_ARMS."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if prefix or key not in KEYS_IGNORED_BETWEEN_ARMS:
            flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


def _default_metric(runs: list[Run]) -> Metric:
    for run in runs:
        for result in run.results:
            for name in result["metrics"]:
                better = declared_direction(result["task"], name, runs)
                if better in ("higher", "lower"):
                    return Metric(result["task"], name, better == "higher")
    return Metric(VALIDATION, "loss/lm", False)
