"""The study file: arms, seeds, the metric that compares the arms, and the amount that is equal for all arms."""

import itertools
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import AliasChoices, Field, field_validator, model_validator

from data_prep.utils.config_file import LocalPath, Section, load_yaml, validate
from data_prep.utils.console import UserError
from data_prep.utils.files import read_json_or_none
from pretrain.config import RunConfig, load_config
from pretrain.report.runs import Metric
from pretrain.sections import BUDGETS
from pretrain.tasks.directions import LOSS_TASK, direction, metric_directions
from pretrain.tasks.options import TaskConfig

FILE = "study.json"
"""File in the study folder with the contents of the study; see record.py."""
STUDY_KEYS = ("name", "seed", "output_dir", "checkpoint.resume")
"""Keys of a run that the study sets; no arm may set them."""


FEWEST_SEEDS = 3
"""Fewest seeds after a pilot."""
Values = dict[str, Any]
"""Dotted keys of a run and their values in a trial of the tuning."""


class MetricConfig(Section):
    """Metric by which the arms are compared."""

    task: str
    """Name or label of a task in `evaluation.tasks` of the base configuration."""
    name: str
    """Name of the metric in results.jsonl."""
    higher_is_better: bool | None = None
    """Whether higher values are better. By default, the declaration of the task applies.

    Required for a metric of the harness, which declares the direction only together with a result.
    """


class PilotConfig(Section):
    """Number of seeds that follows from a pilot; see power.py."""

    detect: float = Field(gt=0)
    """Difference in the metric that the test should find with a probability of 80%."""
    pilot: list[int] = Field(default=[1, 2, 3], min_length=3)
    """Seeds of the pilot, from which the spread is estimated. They are not part of the final comparison."""
    most: int = Field(default=20, ge=FEWEST_SEEDS)
    """Largest number of seeds after the pilot."""


class SlurmConfig(Section):
    """Options of sbatch for the two scripts in launcher/slurm."""

    train: str = ""
    """Options for each run, such as `--nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --time=12:00:00`."""
    evaluate: str = ""
    """Options for the evaluation after each run, such as `--gpus=1`."""


class TuneConfig(Section):
    """Tuning: the search for the best values of some keys, for each arm separately, before the runs are compared.

    Every combination of the values is a trial: it is trained with each seed and scored on rows that are neither
    trained on nor tested.
    """

    keys: dict[str, list[Any]] = {}
    """Dotted keys of a run and the values to try in every arm."""
    arms: dict[str, dict[str, list[Any]]] = {}
    """Keys and values of single arms, in addition to `keys` or in place of them."""
    seeds: list[int] = Field(min_length=1)
    """Seeds of the trials. They must not be seeds of the study."""
    extensions: int = Field(default=2, ge=0)
    """Number of times that the range of a key in `keys` is extended, for all arms alike, if the best value of an arm is
    at the edge of its range."""
    equal: bool = True
    """Whether all arms must have the same number of trials. With false, the report states the numbers."""

    @field_validator("keys", "arms")
    @classmethod
    def _check_values(cls, keys: dict[str, Any]) -> dict[str, Any]:
        grids = [grid for grid in keys.values() if isinstance(grid, dict)] or [keys]
        for key, values in ((key, values) for grid in grids for key, values in grid.items()):
            if text := next((value for value in values if isinstance(value, str) and _is_number(value)), None):
                raise ValueError(f"{key}: {text} is text in YAML; write it with a point, such as {float(text):.1e}")
            if not values or len({str(value) for value in values}) < len(values):
                raise ValueError(f"{key} must list at least one value, and none of them twice")
            if key.split(".")[0] not in ("train", "objective", "model"):
                raise ValueError(f"{key} cannot be tuned; choose a key of train, objective or model")
            if key in (f"train.{budget}" for budget in BUDGETS):
                raise ValueError(f"{key} cannot be tuned, because the budget is matched")
        return keys

    def grid(self, arm: str) -> dict[str, list[Any]]:
        """Return the keys of an arm and their values."""
        return self.keys | self.arms.get(arm, {})


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class StudyConfig(Section):
    """Settings of a study."""

    name: str = Field(pattern=r"^\w[\w.+-]*$")
    base: LocalPath
    """Path of the run configuration that all arms change, relative to the study file."""
    base_changes: dict[str, Any] = {}
    """Dotted keys of the base configuration and their new values, for all arms."""
    output_dir: LocalPath = "runs"
    """Parent folder of the study folder output_dir/name."""
    seeds: list[int] = Field(min_length=1)
    """Seeds of every arm. With a pilot, these are the pilot's seeds, and later the further seeds too."""
    power: PilotConfig | None = Field(default=None, validation_alias=AliasChoices("seeds"), exclude=True)
    """Value of `seeds` in the study file if it is a mapping."""
    matched_by: Literal["tokens", "flops", "seconds", "none"]
    """Amount that is equal for all arms. With `none`, each arm keeps the budget and the batch of its configuration."""
    baseline: str
    """Arm with which all other arms are compared and matched."""
    metric: MetricConfig
    primary: str | None = None
    """Arm of the primary comparison, which is tested first and without a correction for the other arms. They are
    tested only if it differs from the baseline."""
    tune: TuneConfig | None = None
    """Tuning of the arms; without it, the report states that the arms were not tuned."""
    arms: dict[str, dict[str, Any]]
    """Arm name -> dotted keys of a run configuration and their values. {} is the base with `base_changes`."""
    launch: str = ""
    """Command in front of `launcher/run.py`, such as `deepspeed --num_gpus 8`. The default is python: one process."""
    parallel_runs: int = Field(default=1, ge=1)
    """Number of runs that train at the same time on this machine, each as one process. With GPUs, each run has one of
    them; without, each has an equal part of the cores."""
    slurm: SlurmConfig | None = None
    """Slurm options; if set, the runs are submitted as jobs instead of running on this machine."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _use_pilot(cls, seeds: Any) -> Any:
        return seeds.get("pilot", PilotConfig.model_fields["pilot"].default) if isinstance(seeds, dict) else seeds

    @field_validator("power", mode="before")
    @classmethod
    def _is_pilot(cls, seeds: Any) -> Any:
        return seeds if isinstance(seeds, dict) else None

    @field_validator("arms")
    @classmethod
    def _check_arms(cls, arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for arm, changes in arms.items():
            if not re.fullmatch(r"\w[\w.+-]*", arm):
                raise ValueError(
                    f"{arm!r} cannot be the name of an arm because it becomes part of a folder name; "
                    "use letters, digits and _ . + - only"
                )
            cls._check_keys(f"{arm}: ", changes)
        return arms

    @field_validator("base_changes")
    @classmethod
    def _check_base_changes(cls, changes: dict[str, Any]) -> dict[str, Any]:
        cls._check_keys("", changes)
        return changes

    @staticmethod
    def _check_keys(where: str, changes: Mapping[str, Any]) -> None:
        """Raise ValueError if one of the keys, or a key of one of the sections, is set by the study."""
        inner = [f"{key}.{name}" for key, value in changes.items() if isinstance(value, dict) for name in value]
        if key := next((key for key in [*changes, *inner] if key in STUDY_KEYS), None):
            raise ValueError(f"{where}{key} is set by the study; remove it")

    @model_validator(mode="after")
    def _check_consistency(self) -> "StudyConfig":
        if self.baseline not in self.arms:
            raise ValueError(
                f"baseline is {self.baseline!r}, but the arms are {', '.join(self.arms) or 'none'}; name one of them"
            )
        if self.primary is not None and (self.primary not in self.arms or self.primary == self.baseline):
            raise ValueError(f"primary is {self.primary!r}; name an arm other than the baseline")
        if self.tune:
            self._check_tuning(self.tune)
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds lists a seed twice; remove one")
        if self.power and len(self.arms) < 2:
            raise ValueError("seeds.detect needs an arm other than the baseline; add one, or list the seeds")
        try:
            shlex.split(self.launch)
        except ValueError as error:
            raise ValueError(f"launch is not a valid command line: {error}") from None
        if self.launch and self.slurm:
            raise ValueError(
                "launch and slurm exclude each other because srun starts the ranks under Slurm; remove one"
            )
        other = "launch" if self.launch else "slurm" if self.slurm else None
        if self.parallel_runs > 1 and other:
            raise ValueError(
                f"parallel_runs starts each run as one process on this machine, so {other} cannot be set too; remove "
                "one of them"
            )
        for arm, changes in self.arms.items():
            budget_keys = ("train", *(f"train.{budget}" for budget in BUDGETS))
            budget = next((key for key in changes if key in budget_keys), None)
            if self.matched_by != "none" and budget:
                raise ValueError(
                    f"arms.{arm}: the budget follows from matched_by={self.matched_by}; "
                    f"remove {budget}, or set matched_by: none"
                )
        return self

    def _check_tuning(self, tune: TuneConfig) -> None:
        if not tune.keys and not tune.arms:
            raise ValueError("tune has no keys to tune; list some in tune.keys or tune.arms, or remove tune")
        if unknown := tune.arms.keys() - self.arms.keys():
            raise ValueError(f"tune.arms names {min(unknown)!r}, which is not an arm")
        compared = set(self.seeds)
        if self.power:  # the further seeds follow the pilot
            first = max(self.power.pilot) + 1
            compared |= set(range(first, first + self.power.most))
        if shared := set(tune.seeds) & compared:
            raise ValueError(
                f"tune.seeds and seeds share {min(shared)}: runs with the seed of a trial would not be fresh; choose "
                "different seeds"
            )
        trials = {arm: math.prod(map(len, tune.grid(arm).values())) for arm in self.arms}
        if tune.equal and len(set(trials.values())) > 1:
            listed = ", ".join(f"{arm} {count}" for arm, count in trials.items())
            raise ValueError(
                f"the arms have different numbers of trials ({listed}): list as many values for each of them in "
                "tune.arms, or set tune.equal: false, which the report states"
            )


@dataclass(frozen=True)
class Study:
    """Contents of a study file, with the path of its base configuration."""

    config: StudyConfig
    base: Path

    @property
    def folder(self) -> Path:
        """Folder that holds all output of the study."""
        return Path(self.config.output_dir) / self.config.name

    @property
    def first_seed(self) -> int:
        """First seed of the study's first start. Budgets are computed with it, so it may be removed from the seeds."""
        record = read_json_or_none(self.folder / FILE) or {}
        if "first_seed" in record:
            return int(record["first_seed"])
        for arm in record.get("arms", {}).values():  # written by an earlier version
            return int(next(iter(arm["runs"])))
        return self.config.seeds[0]

    @property
    def metric(self) -> Metric:
        """Metric by which the arms are compared."""
        return Metric(**self.config.metric.model_dump())

    def load_base(self, changes: Mapping[str, Any]) -> RunConfig:
        """Return the base configuration, changed by `base_changes` and then by dotted keys. Raises UserError."""
        overrides = [*self.config.base_changes.items(), *changes.items()]
        return load_config(self.base, [as_override(key, value) for key, value in overrides])

    def run_config(self, arm: str, seed: int, extra_keys: dict[str, Any] | None = None) -> RunConfig:
        """Return the configuration of a run: the base, changed by the arm and then by the dotted `extra_keys`.

        Raises a UserError that names the arm.
        """
        extra_keys = {
            "name": run_name(arm, seed),
            "seed": seed,
            "output_dir": str(self.folder),
            "checkpoint.resume": "auto",
        } | (extra_keys or {})
        changes = self.config.arms[arm]
        # a key that both set is applied last, or a section would replace keys below it
        changes = {key: value for key, value in changes.items() if key not in extra_keys} | extra_keys
        try:
            config = self.load_base(changes)
        except UserError as error:
            raise UserError(f"arms.{arm}: {error}") from None
        if config.branch_from is not None:
            raise UserError(
                f"arms.{arm}: the runs of a study start from initial weights or model.init_from; remove branch_from"
            )
        if config.hub is not None:
            raise UserError(f"arms.{arm}: all runs of a study would push to the same repository; remove export.hub")
        return config

    def loss_terms(self) -> list[str]:
        """Return the terms of the objectives of all arms."""
        from pretrain.objectives.base import ModelShape, build_objective  # imported late because it loads torch

        any_shape = ModelShape(width=1, layers=10**6)  # the terms do not depend on it
        configs = [self.run_config(arm, self.config.seeds[0]) for arm in self.config.arms]
        objectives = [build_objective(config.objective, any_shape) for config in configs]
        return list(dict.fromkeys(term for objective in objectives for term in objective.weights))


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[Values]:
    """Return all combinations of the values of a grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def run_name(arm: str, seed: int) -> str:
    """Return the name of a run, which is also the name of its folder in the study folder."""
    return f"{arm}-seed{seed}"


def as_override(key: str, value: Any) -> str:
    """Return `key=value` for a dotted key and its value, as on the command line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()
    return f"{key}={text}"


def load_study(path: Path, overrides: list[str]) -> Study:
    """Read and check a study file; an override `base=` is relative to the current folder. Raises UserError."""
    overrides = [
        f"base={os.path.abspath(os.path.expanduser(word[len('base=') :]))}" if word.startswith("base=") else word
        for word in overrides
    ]
    config = validate(
        StudyConfig, load_yaml(path, overrides, tuple(key for key in StudyConfig.model_fields if key != "power"))
    )
    study = Study(config, path.parent / config.base)
    if config.base_changes:
        try:
            study.load_base({})
        except UserError as error:
            raise UserError(f"base_changes: {error}") from None
    base = study.run_config(config.baseline, config.seeds[0])
    tasks = {task.title: task for task in base.evaluation.tasks}
    if config.metric.task not in tasks:
        existing_tasks = f"the tasks {', '.join(tasks)}; name one of its tasks, or" if tasks else "no evaluation.tasks;"
        raise UserError(
            f"metric.task is {config.metric.task!r}, but the base configuration {study.base} has {existing_tasks} "
            "add the task"
        )
    _resolve_metric(study, tasks[config.metric.task], base.data.views)
    _check_trials(study)
    return study


def _check_trials(study: Study) -> None:
    """Raise UserError if a trial of the tuning is not a valid run."""
    if tune := study.config.tune:
        for arm in study.config.arms:
            for values in combinations(tune.grid(arm)):
                study.run_config(arm, tune.seeds[0], values)


def _resolve_metric(study: Study, task: TaskConfig, views: tuple[str, ...]) -> None:
    """Check the metric, and set its `higher_is_better` to the declared direction if it is None.

    Raises UserError if the task does not report the metric, or if no direction is set or declared.
    """
    metric = study.config.metric
    declared_direction = direction(task.name, metric.name)
    reported = [name for name in metric_directions(task.name) if task.reports_metric(name, views)]
    is_reported = declared_direction is not None and task.reports_metric(metric.name, views)
    if task.name == LOSS_TASK:
        reported = [*study.loss_terms(), *reported]
        is_reported = metric.name in reported
    if reported and not is_reported:
        raise UserError(
            f"metric.name is {metric.name!r}, but the task {metric.task} reports {', '.join(reported)}; "
            "name one of these"
        )
    if metric.higher_is_better is not None:
        return
    if declared_direction not in ("higher", "lower"):
        raise UserError(
            f"metric.name is {metric.name!r}, which has no declared direction; "
            "set metric.higher_is_better to true or false"
        )
    metric.higher_is_better = declared_direction == "higher"
