"""Contents of run directories: settings, curves and scores."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from data_prep.utils.config_file import parse_yaml
from data_prep.utils.console import UserError
from data_prep.utils.files import read_json_or_none
from pretrain.config import config_values, load_config
from pretrain.evaluation.results import read_results, scoring_version
from pretrain.objectives.configs import ObjectiveConfig, objective_configs
from pretrain.run_folder import read_metrics, read_status
from pretrain.tasks.directions import VALIDATION, MetricDirection, direction

FINETUNING = ("finetune", "finetune_objective", "finetune_lora")
"""Keys of a task that configure its finetuning."""


@dataclass(frozen=True)
class Run:
    """Contents of a run directory."""

    folder: Path
    config: dict[str, Any]
    """Configuration as plain values. Defaults of the current version are filled in if it can read the file."""
    environment: dict[str, Any]
    status: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: list[dict[str, Any]]
    record: Path | None = None
    """Record that `folder` was extracted from; None for a run directory."""

    @property
    def seed(self) -> int:
        """Seed of the run."""
        seed: int = self.config.get("seed", 0)
        return seed

    @property
    def objective(self) -> str:
        """Name of the objective."""
        name: str = self.config["objective"]["name"]
        return name

    @property
    def has_pair_term(self) -> bool:
        """Whether the objective has a term on pairs.

        An objective that the current version cannot read counts as having a pair term, unless it is next_token.
        """
        config = self._objective_config
        return self.objective != "next_token" if config is None else config.pairing is not None

    @property
    def switched_off(self) -> bool:
        """Whether the terms of the objective are switched off at the end of the run."""
        config = self._objective_config
        return config is not None and config.factor(1.0) == 0

    @property
    def embedding_group(self) -> str:
        """Group of metric tags for the embeddings that the pair term compares."""
        return self._objective_config.embedding_group if self._objective_config else "embedding"

    @property
    def _objective_config(self) -> ObjectiveConfig | None:
        """Configuration of the objective; None if the current version cannot read it."""
        try:
            return objective_configs()[self.objective].model_validate(self.config["objective"])
        except (KeyError, ValidationError):
            return None

    @property
    def finished(self) -> bool:
        """Whether the run has used its whole budget."""
        return self.status.get("status") == "finished" and bool(self.metrics)

    @property
    def last(self) -> dict[str, Any]:
        """Last line of metrics.jsonl: the values at the last logged step, with the tokens and seconds so far.

        It is {} if nothing has been logged.
        """
        return self.metrics[-1] if self.metrics else {}

    @property
    def processor_seconds(self) -> float | None:
        """Processor time of the training; None on a GPU, and if an earlier version trained a part of the run."""
        if not all("processor_seconds" in line for line in self.metrics):
            return None
        return self.last.get("processor_seconds") or None

    @property
    def root(self) -> Path:
        """Folder in which the run was started, to which the paths in its configuration are relative.

        It is the current folder if output_dir is absolute or the run directory has been moved.
        """
        written = Path(self.config.get("output_dir", "runs")) / self.config["name"]
        folder = self.folder.resolve()
        if written.is_absolute() or folder.parts[-len(written.parts) :] != written.parts:
            return Path()
        return folder.parents[len(written.parts) - 1]

    def curve(self, tag: str) -> list[tuple[int, float]]:
        """Return a (step, value) pair for each line of metrics.jsonl that has the tag."""
        return [(line["step"], line[tag]) for line in self.metrics if line.get(tag) is not None]

    def layer_curves(self, tag: str) -> dict[str, list[tuple[int, float]]]:
        """Return the curve of each part of the model that has a measure of the layers, such as `layers/gradient_norm`.

        Values that were not finite are absent.
        """
        curves: dict[str, list[tuple[int, float]]] = {}
        for line in self.metrics:
            for part, value in line.get(tag, {}).items():
                if value is not None:
                    curves.setdefault(part, []).append((line["step"], value))
        return curves

    def value(self, *tags: str) -> float | None:
        """Return the last value of the first of these tags that the run has; None if it lacks all of them."""
        return next((curve[-1][1] for curve in map(self.curve, tags) if curve), None)

    def consumed(self, key: str, steps: Iterable[int]) -> np.ndarray:
        """Return the values (n,) of a counter of metrics.jsonl, such as `tokens` or `seconds`, at the given steps.

        Values between logged steps are interpolated linearly, starting with 0 at step 0.
        """
        lines = [{"step": 0, key: 0}, *self.metrics]
        values: np.ndarray = np.interp(list(steps), [line["step"] for line in lines], [line[key] for line in lines])
        return values


@dataclass(frozen=True)
class Metric:
    """Metric of a task in evaluation/results.jsonl or, for the task `validation`, a tag of metrics.jsonl."""

    task: str
    name: str
    higher_is_better: bool

    def __str__(self) -> str:
        return f"{self.task}/{self.name}"

    @staticmethod
    def parse(text: str, runs: list[Run], planned: "Metric | None" = None) -> "Metric":
        """Parse TASK/NAME, or TASK/NAME:higher or TASK/NAME:lower for a metric that declares no direction.

        If the text names the `planned` metric without a direction, that metric is returned. Raises UserError for a
        metric that no run has, or that has no direction.
        """
        metric_name = text
        given_direction: str | None = None
        if text.endswith((":higher", ":lower")):
            metric_name, _, given_direction = text.rpartition(":")
        task, slash, name = metric_name.partition("/")
        if not (task and slash and name):
            raise UserError(
                f"--metric {text} is not of the form TASK/NAME; for example, write nl_rx/exact or validation/loss/lm"
            )
        metric = Metric(task, name, True)
        if metric.common_settings(runs) is None and not any(metric.curve(run, None) for run in runs):
            raise UserError(f"no run has the metric {metric}; available: {known_metrics(runs)}")
        if given_direction is None and planned is not None and str(planned) == metric_name:
            return planned
        better = given_direction or declared_direction(task, name, runs)
        if better not in ("higher", "lower"):
            reason = (
                "neither higher nor lower values are better in themselves" if better else "it declares no direction"
            )
            raise UserError(
                f"--metric {metric_name}: {reason}; write {metric_name}:higher or {metric_name}:lower "
                "to choose the better direction"
            )
        return Metric(task, name, better == "higher")

    def curve(self, run: Run, key: str | None) -> list[tuple[int, float]]:
        """Return (step, value) pairs in order of steps. Results of several finetuning seeds at a step are averaged.

        Only results with this comparison key are used; see `common_settings`.
        """
        if self.task == VALIDATION:
            return run.curve(f"{self.task}/{self.name}")
        values: dict[int, list[float]] = {}
        for result in self.results(run):
            if comparison_key(result, run.config) == key:
                values.setdefault(result["step"], []).append(result["metrics"][self.name])
        return [(step, float(np.mean(values[step]))) for step in sorted(values)]

    def results(self, run: Run) -> list[dict[str, Any]]:
        """Return the results of the metric's task that contain the metric."""
        return [
            result
            for result in run.results
            if result["task"] == self.task and result["metrics"].get(self.name) is not None
        ]

    def final(self, run: Run, key: str | None) -> float | None:
        """Return the value at the last step of a run; None if it has no such value or is not finished."""
        curve = self.curve(run, key) if run.finished else []
        return curve[-1][1] if curve and curve[-1][0] == run.last["step"] else None

    def is_evaluated(self, run: Run) -> bool:
        """Return whether a run is finished and has the metric at its last step, under any settings."""
        steps = (
            [step for step, _ in self.curve(run, None)]
            if self.task == VALIDATION
            else [result["step"] for result in self.results(run)]
        )
        return run.finished and run.last["step"] in steps

    def common_settings(self, runs: list[Run]) -> str | None:
        """Return the comparison key of the results to compare; None if no run has the metric.

        Only results with the same key may be compared; see `comparison_key`. Among the keys with the newest scoring
        version, the one that most runs share is returned. Only results at the last step of a run are considered, or all
        results if there are none.
        """
        run_counts: dict[str, int] = {}
        for run in runs:
            for key in {
                comparison_key(result, run.config)
                for result in self.results(run)
                if result["step"] == run.last.get("step")
            }:
                run_counts[key] = run_counts.get(key, 0) + 1
        if not run_counts:
            run_counts = {comparison_key(result, run.config): 1 for run in runs for result in self.results(run)}
        if not run_counts:
            return None
        return max(sorted(run_counts), key=lambda key: (parse_scoring_version(key), run_counts[key]))

    def scoring_versions(self, run: Run) -> set[int]:
        """Return the scoring versions of the metric's results at the last step of a run."""
        return {scoring_version(result) for result in self.results(run) if result["step"] == run.last.get("step")}


def tasks_by_title(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the evaluation tasks of a run's configuration; the keys are their names in results."""
    tasks = (config.get("evaluation") or {}).get("tasks") or []
    return {task.get("label") or task["name"]: task for task in tasks}


def declared_direction(task: str, name: str, runs: list[Run]) -> MetricDirection | None:
    """Return a metric's direction as recorded in a result or, for older results, as declared by its task."""
    for run in runs:
        for result in run.results:
            if result["task"] == task and name in result.get("directions", {}):
                recorded: MetricDirection = result["directions"][name]
                return recorded
    configured = [tasks_by_title(run.config) for run in runs]
    task_kinds = {tasks[task]["name"] for tasks in configured if tasks.get(task)} or {task}
    return next((declared for kind in sorted(task_kinds) if (declared := direction(kind, name))), None)


def known_metrics(runs: list[Run]) -> str:
    """Return the names of all metrics of the runs as message text."""
    evaluated = {f"{result['task']}/{name}" for run in runs for result in run.results for name in result["metrics"]}
    validated = {tag for run in runs for tag in run.last if tag.startswith(f"{VALIDATION}/")}
    return ", ".join(sorted(evaluated | validated)) or "none yet: evaluate the runs with launcher/evaluate.py RUN_DIR"


def finetune_settings(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the finetuning settings of each task in a run's configuration; the keys are the task titles."""
    return {
        title: {key: task[key] for key in FINETUNING if task.get(key) is not None}
        for title, task in tasks_by_title(config).items()
    }


def comparison_key(result: dict[str, Any], config: dict[str, Any]) -> str:
    """Return what comparable results have in common: settings, file hashes, overrides, rows and scoring version.

    File paths and the finetuning seed may differ. Finetuning settings that come from the run's configuration may also
    differ, because arms may differ in them.
    """
    settings = dict(result.get("settings") or {})
    finetuning = {key: settings[key] for key in FINETUNING if settings.get(key) is not None}
    if finetuning and finetuning == finetune_settings(config).get(result["task"]):
        settings = {key: value for key, value in settings.items() if key not in FINETUNING} | {
            "finetune": "as configured"
        }
    files = settings.get("files") or {}
    compared_settings = {
        key: _without_local_path(value, files)
        for key, value in settings.items()
        if key not in ("train", "test", "files", "overrides")
        or (isinstance(value, dict) and value.get("type") == "hub")
    }
    overrides = [word for word in settings.get("overrides", []) if not word.startswith("seed=")]
    return json.dumps(
        [
            compared_settings,
            sorted(files.values()),
            overrides,
            result.get("rows"),
            scoring_version(result),
        ],
        sort_keys=True,
    )


def _without_local_path(value: Any, files: dict[str, str]) -> Any:
    """Return a hub source without its path if it is a folder, whose files have hashes; anything else unchanged."""
    folder = value.get("path") if isinstance(value, dict) else None
    if folder and any(Path(folder) in Path(file).parents for file in files):
        return {key: entry for key, entry in value.items() if key != "path"}
    return value


def parse_scoring_version(key: str) -> int:
    """Return the scoring version in a key made by `comparison_key`."""
    version: int = json.loads(key)[-1]
    return version


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run directory."""
    return (folder / "config.yaml").is_file()


def read_run(folder: Path) -> Run:
    """Read a run directory, whether or not the run is finished. Raises UserError if its config.yaml is not valid."""
    path = folder / "config.yaml"
    try:
        config: Any = config_values(load_config(path))
    except UserError:  # written by a different version; the results can still be compared
        try:
            config = parse_yaml(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError):
            config = None
        if not isinstance(config, dict) or "name" not in config or "name" not in (config.get("objective") or {}):
            raise UserError(
                f"{path} is not the configuration of a run: it lacks `name` or `objective.name`; "
                "pass a different folder"
            ) from None
    return Run(
        folder,
        config,
        read_json_or_none(folder / "environment.json") or {},
        read_status(folder),
        read_metrics(folder),
        read_results(folder),
    )
