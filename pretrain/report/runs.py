"""What a run directory tells: its settings, its curves, and its scores."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from data_prep.console import UserError
from data_prep.files import read_json_or_none
from pretrain.config import dump_config, load_config
from pretrain.evaluation.results import read_results, scoring_version
from pretrain.objectives.configs import objective_configs
from pretrain.run_folder import read_metrics, read_status
from pretrain.tasks.directions import VALIDATION, MetricDirection, direction

FINETUNING = ("finetune", "finetune_objective", "finetune_lora")
"""Keys of a task."""


@dataclass(frozen=True)
class Run:
    """A run directory as it was read."""

    folder: Path
    config: dict[str, Any]
    """Plain values, with the defaults of this version where it reads them."""
    environment: dict[str, Any]
    status: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: list[dict[str, Any]]

    @property
    def seed(self) -> int:
        """Seed of the run."""
        seed: int = self.config.get("seed", 0)
        return seed

    @property
    def objective(self) -> str:
        """The name of its objective."""
        name: str = self.config["objective"]["name"]
        return name

    @property
    def has_pair_term(self) -> bool:
        """Whether its objective has a term on pairs; of one that this version does not read, whether it is another than next_token."""
        try:
            return objective_configs()[self.objective].model_validate(self.config["objective"]).pairing is not None
        except (KeyError, ValidationError):
            return self.objective != "next_token"

    @property
    def finished(self) -> bool:
        """Whether it has consumed its budget."""
        return self.status.get("status") == "finished" and bool(self.metrics)

    @property
    def last(self) -> dict[str, Any]:
        """The last line of metrics.jsonl: what it has consumed, and its last values."""
        return self.metrics[-1] if self.metrics else {}

    @property
    def root(self) -> Path:
        """The folder in which it was started, if the run directory still stands where it was written; paths of the configuration start there."""
        written = Path(self.config.get("output_dir", "runs")) / self.config["name"]
        folder = self.folder.resolve()
        if written.is_absolute() or folder.parts[-len(written.parts) :] != written.parts:
            return Path()
        return folder.parents[len(written.parts) - 1]

    def curve(self, tag: str) -> list[tuple[int, float]]:
        """(step, value) wherever metrics.jsonl has the tag."""
        return [(line["step"], line[tag]) for line in self.metrics if line.get(tag) is not None]

    def value(self, *tags: str) -> float | None:
        """The last value of the first of the tags that the run has."""
        return next((curve[-1][1] for curve in map(self.curve, tags) if curve), None)

    def consumed(self, key: str, steps: Iterable[int]) -> np.ndarray:
        """A counter of metrics.jsonl (`tokens`, `seconds`) at steps, on a straight line between the logged ones, which start at 0."""
        lines = [{"step": 0, key: 0}, *self.metrics]
        values: np.ndarray = np.interp(list(steps), [line["step"] for line in lines], [line[key] for line in lines])
        return values


@dataclass(frozen=True)
class Metric:
    """One number of a run: of a task of evaluation/results.jsonl, or, for the task `validation`, a tag of metrics.jsonl."""

    task: str
    name: str
    higher_is_better: bool

    def __str__(self) -> str:
        return f"{self.task}/{self.name}"

    @staticmethod
    def parse(text: str, runs: list[Run], planned: "Metric | None" = None) -> "Metric":
        """Read TASK/NAME, or TASK/NAME:higher or :lower where the metric declares no direction.

        The direction of a `planned` metric is that of the plan. Raises UserError for a metric that no run has, or without a direction.
        """
        path, _, given = text.rpartition(":") if text.endswith((":higher", ":lower")) else (text, "", None)
        task, slash, name = path.partition("/")
        if not (task and slash and name):
            raise UserError(f"--metric {text}: write TASK/NAME, such as nl_rx/exact or validation/loss/lm")
        metric = Metric(task, name, True)
        if metric.common_settings(runs) is None and not any(metric.curve(run, None) for run in runs):
            raise UserError(f"no run has the metric {metric}; there are {known_metrics(runs)}")
        if given is None and planned is not None and str(planned) == path:
            return planned
        found = given or declared_direction(task, name, runs)
        if found not in ("higher", "lower"):
            why = "neither more nor less of it is better by itself" if found else "it declares no direction"
            raise UserError(
                f"--metric {path}: {why}; write {path}:higher or {path}:lower to say what you take for better"
            )
        return Metric(task, name, found == "higher")

    def curve(self, run: Run, settings: str | None) -> list[tuple[int, float]]:
        """(step, value), ascending; several results of a step, from several finetuning seeds, as their mean. `settings` as of `common_settings`."""
        if self.task == VALIDATION:
            return run.curve(f"{self.task}/{self.name}")
        found: dict[int, list[float]] = {}
        for result in self.results(run):
            if comparison_key(result, run.config) == settings:
                found.setdefault(result["step"], []).append(result["metrics"][self.name])
        return [(step, float(np.mean(found[step]))) for step in sorted(found)]

    def results(self, run: Run) -> list[dict[str, Any]]:
        """The results of its task that have it."""
        return [
            result
            for result in run.results
            if result["task"] == self.task and result["metrics"].get(self.name) is not None
        ]

    def final(self, run: Run, settings: str | None) -> float | None:
        """The value at the last step of a finished run; None where it has none."""
        curve = self.curve(run, settings) if run.finished else []
        return curve[-1][1] if curve and curve[-1][0] == run.last["step"] else None

    def common_settings(self, runs: list[Run]) -> str | None:
        """Return the settings of the newest scoring under which most runs have it at their last step; None without any.

        Only results under the same settings, by the same version of the scoring, may be compared.
        """
        votes: dict[str, int] = {}
        for run in runs:
            for settings in {
                comparison_key(result, run.config)
                for result in self.results(run)
                if result["step"] == run.last.get("step")
            }:
                votes[settings] = votes.get(settings, 0) + 1
        if not votes:
            votes = {comparison_key(result, run.config): 1 for run in runs for result in self.results(run)}
        return (
            max(sorted(votes), key=lambda settings: (parse_scoring_version(settings), votes[settings]))
            if votes
            else None
        )

    def scoring_versions(self, run: Run) -> set[int]:
        """Return the versions of the scoring that gave its values at the last step of a run."""
        return {scoring_version(result) for result in self.results(run) if result["step"] == run.last.get("step")}


def tasks_by_title(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the evaluation tasks of a run's configuration by what results call them."""
    tasks = (config.get("evaluation") or {}).get("tasks") or []
    return {task.get("label") or task["name"]: task for task in tasks}


def declared_direction(task: str, name: str, runs: list[Run]) -> MetricDirection | None:
    """Return the direction of a metric as a result of it records it or, in results of older versions, as its task declares it."""
    for run in runs:
        for result in run.results:
            if result["task"] == task and name in result.get("directions", {}):
                recorded: MetricDirection = result["directions"][name]
                return recorded
    kinds = {known["name"] for run in runs if (known := tasks_by_title(run.config).get(task))} or {task}
    return next((found for kind in sorted(kinds) if (found := direction(kind, name))), None)


def known_metrics(runs: list[Run]) -> str:
    """Return all metrics of the runs, for messages."""
    evaluated = {f"{result['task']}/{name}" for run in runs for result in run.results for name in result["metrics"]}
    validated = {tag for run in runs for tag in run.last if tag.startswith(f"{VALIDATION}/")}
    return ", ".join(sorted(evaluated | validated)) or "none yet: evaluate the runs with launcher/evaluate.py RUN_DIR"


def finetune_settings(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """How each task of a run's configuration finetunes, by its title."""
    return {
        title: {key: task[key] for key in FINETUNING if task.get(key) is not None}
        for title, task in tasks_by_title(config).items()
    }


def comparison_key(result: dict[str, Any], config: dict[str, Any]) -> str:
    """What must be equal for results to compare: scoring, rows, settings and content of the files, wherever these lie; not a finetuning's seed.

    Nor how it finetunes, where that is what the run's configuration says: arms may differ in it.
    """
    settings = dict(result.get("settings") or {})
    finetuning = {key: settings[key] for key in FINETUNING if settings.get(key) is not None}
    if finetuning and finetuning == finetune_settings(config).get(result["task"]):
        settings = {key: value for key, value in settings.items() if key not in FINETUNING} | {
            "finetune": "as the configuration says"
        }
    kept = {
        key: value
        for key, value in settings.items()
        if key not in ("train", "test", "files", "overrides")
        or (isinstance(value, dict) and value.get("type") == "hub")
    }
    overrides = [word for word in settings.get("overrides", []) if not word.startswith("seed=")]
    return json.dumps(
        [kept, sorted((settings.get("files") or {}).values()), overrides, result.get("rows"), scoring_version(result)],
        sort_keys=True,
    )


def parse_scoring_version(settings: str) -> int:
    """Return the version of the scoring in an `identity`."""
    version: int = json.loads(settings)[-1]
    return version


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    return (folder / "config.yaml").is_file()


def read_run(folder: Path) -> Run:
    """Read a run directory, at any state of the run. Raises UserError for a configuration that is none."""
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(dump_config(load_config(path)))
    except UserError:  # of another version, which is no reason not to compare what it wrote
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError):
            config = None
        if not isinstance(config, dict) or "name" not in config or "name" not in (config.get("objective") or {}):
            raise UserError(f"{path} is no configuration of a run: it needs name and objective.name") from None
    return Run(
        folder,
        config,
        read_json_or_none(folder / "environment.json") or {},
        read_status(folder),
        read_metrics(folder),
        read_results(folder),
    )
