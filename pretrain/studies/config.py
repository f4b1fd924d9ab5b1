"""The study file: which arms, which seeds, and what they are matched by."""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from data_prep.config_file import LocalPath, Section, load_yaml, validate
from data_prep.console import UserError
from pretrain.config import RunConfig, load_config
from pretrain.report.runs import Metric
from pretrain.sections import BUDGETS
from pretrain.tasks.directions import direction, metric_directions
from pretrain.tasks.options import TaskConfig

OF_THE_STUDY = ("name", "seed", "output_dir", "checkpoint.resume")
"""Keys of a run that no arm sets."""


class MetricConfig(Section):
    """What the arms are compared by."""

    task: str
    """Name, or label, of one of `evaluation.tasks` of the base configuration."""
    name: str
    """The metric of that task, as results.jsonl names it."""
    higher_is_better: bool | None = None
    """By default what the task declares; of a metric of the harness, which declares it with its result only, it must be given."""


class SlurmConfig(Section):
    """Options of sbatch, for the two scripts of launcher/slurm."""

    train: str = ""
    """For each run, such as `--nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --time=12:00:00`."""
    evaluate: str = ""
    """For the evaluation that follows a run, such as `--gpus=1`."""


class StudyConfig(Section):
    """One study."""

    name: str = Field(pattern=r"^\w[\w.+-]*$")
    base: LocalPath
    """The run configuration that all arms start from, relative to the study file."""
    output_dir: LocalPath = "runs"
    """The study's folder is output_dir/name."""
    seeds: list[int] = Field(min_length=1)
    matched_by: Literal["tokens", "flops", "seconds", "none"]
    """What all arms get the same of. none: each arm has the budget and the batch of its own configuration."""
    baseline: str
    """The arm that the others are compared with, and matched to."""
    metric: MetricConfig
    arms: dict[str, dict[str, Any]]
    """Name -> dotted keys of a run configuration and their values; an empty mapping is the base configuration as it is."""
    launch: str = ""
    """What stands before `launcher/run.py`, such as `deepspeed --num_gpus 8`; by default plain python, one process."""
    slurm: SlurmConfig | None = None
    """Submit jobs instead of running here."""

    @field_validator("arms")
    @classmethod
    def _arms_are_named(cls, arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for arm, changes in arms.items():
            if not re.fullmatch(r"\w[\w.+-]*", arm):
                raise ValueError(
                    f"{arm!r} cannot name an arm, which is part of a folder's name: letters, digits and _ . + - make one"
                )
            for key in changes:
                if key in OF_THE_STUDY:
                    raise ValueError(f"{arm}: {key} is set by the study: leave it out")
        return arms

    @model_validator(mode="after")
    def _consistent(self) -> "StudyConfig":
        if self.baseline not in self.arms:
            raise ValueError(f"baseline is {self.baseline!r}, but the arms are {', '.join(self.arms) or 'none'}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands in seeds twice")
        try:
            shlex.split(self.launch)
        except ValueError as error:
            raise ValueError(f"launch is no command line: {error}") from None
        if self.launch and self.slurm:
            raise ValueError("launch and slurm exclude each other: under Slurm, srun starts the ranks")
        for arm, changes in self.arms.items():
            budget = next(
                (key for key in changes if key in ("train", *(f"train.{budget}" for budget in BUDGETS))), None
            )
            if self.matched_by != "none" and budget:
                raise ValueError(
                    f"arms.{arm}: the budget follows from matched_by={self.matched_by}: leave out {budget}, or set matched_by: none"
                )
        return self


@dataclass(frozen=True)
class Study:
    """A study file that was read."""

    config: StudyConfig
    base: Path

    @property
    def folder(self) -> Path:
        """Where everything of the study is written."""
        return Path(self.config.output_dir) / self.config.name

    @property
    def metric(self) -> Metric:
        """What the arms are compared by."""
        return Metric(**self.config.metric.model_dump())

    def run_config(self, arm: str, seed: int, more: dict[str, Any] | None = None) -> RunConfig:
        """The configuration of a run: base, arm, then `more` dotted keys. Raises UserError naming the arm."""
        changes = (
            self.config.arms[arm]
            | {"name": run_name(arm, seed), "seed": seed, "output_dir": str(self.folder), "checkpoint.resume": "auto"}
            | (more or {})
        )
        try:
            return load_config(self.base, [as_override(key, value) for key, value in changes.items()])
        except UserError as error:
            raise UserError(f"arms.{arm}: {error}") from None


def run_name(arm: str, seed: int) -> str:
    """The name of a run, and of its folder in the study's."""
    return f"{arm}-seed{seed}"


def as_override(key: str, value: Any) -> str:
    """A dotted key and its value as the command line has them."""
    return f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix('...' + chr(10)).strip()}"


def load_study(path: Path, overrides: list[str]) -> Study:
    """Read and check a study file; `base=` among the overrides is relative to the working folder. Raises UserError."""
    overrides = [
        f"base={os.path.abspath(os.path.expanduser(word[len('base=') :]))}" if word.startswith("base=") else word
        for word in overrides
    ]
    config = validate(StudyConfig, load_yaml(path, overrides, tuple(StudyConfig.model_fields)))
    study = Study(config, path.parent / config.base)
    base = study.run_config(config.baseline, config.seeds[0])
    tasks = {task.title: task for task in base.evaluation.tasks}
    if config.metric.task not in tasks:
        raise UserError(
            f"metric.task is {config.metric.task!r}, but the base configuration {study.base} has "
            f"{'the tasks ' + ', '.join(tasks) if tasks else 'no evaluation.tasks'}: name one of those, or add it"
        )
    _check_metric(config.metric, tasks[config.metric.task], base.data.views)
    return study


def _check_metric(metric: MetricConfig, task: TaskConfig, views: tuple[str, ...]) -> None:
    """Give the metric of a task its declared direction. Raises UserError if it has none, or the task no such metric."""
    found, declared = (
        direction(task.name, metric.name),
        [name for name in metric_directions(task.name) if task.reports_metric(name, views)],
    )
    if declared and (found is None or not task.reports_metric(metric.name, views)):
        raise UserError(
            f"metric.name is {metric.name!r}, but the task {metric.task} gives {', '.join(declared)}: name one of those"
        )
    if metric.higher_is_better is not None:
        return
    if found not in ("higher", "lower"):
        raise UserError(
            f"metric.name is {metric.name!r}, which has no declared direction: set metric.higher_is_better to true or false"
        )
    metric.higher_is_better = found == "higher"
