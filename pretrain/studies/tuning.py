"""Tuning of the arms of a study, on rows that are neither trained on nor tested, before the runs that are compared.

Each combination of values of an arm is a trial: an arm of a study within the study, in the folder `tuning`, with the
seeds of the tuning. If the best value of an arm is at the edge of its range, the range is extended for all arms.
"""

import datetime
import itertools
import logging
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.task_rows import write_views
from data_prep.utils.console import UserError
from data_prep.utils.files import sha256_file
from pretrain.config import RunConfig
from pretrain.data.corpus import Corpus
from pretrain.report.runs import read_run
from pretrain.studies.calibration import seconds_per_flop
from pretrain.studies.config import Study, TuneConfig
from pretrain.studies.matching import Matching
from pretrain.studies.plan import check_runs, make_runs
from pretrain.studies.processes import ProcessRunner
from pretrain.studies.record import Run, StudyRecord
from pretrain.studies.runner import EXIT_CODE_STOPPED, is_done, run_locally, save_records
from pretrain.studies.slurm import submit_runs
from pretrain.tasks.options import RowTask, TaskConfig

logger = logging.getLogger(__name__)

FOLDER = "tuning"
"""Folder of the trials in the study folder, which is a study folder too."""
ROWS_FILE = "validation.jsonl"
"""File in that folder with the validation split of the corpus, if the task has no validation rows."""
Values = dict[str, Any]
"""Dotted keys of a run and their values in a trial."""


@dataclass(frozen=True)
class Trial:
    """A trial of an arm, and the mean score of its runs."""

    values: Values
    scores: dict[int, float]
    """Score by seed."""

    @property
    def mean(self) -> float:
        """Mean score over the seeds."""
        return statistics.fmean(self.scores.values())


def trial_name(arm: str, values: Values) -> str:
    """Return the name of a trial, such as `cosine.learning_rate-0.002`."""
    parts = [re.sub(r"[^\w.+-]", "_", f"{key.rpartition('.')[2]}-{value}") for key, value in values.items()]
    return ".".join([arm, *parts])


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[Values]:
    """Return all combinations of the values of a grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def best_trial(trials: Sequence[Trial], higher_is_better: bool) -> Trial:
    """Return the trial with the best mean score; among equal ones, the first.

    Raises UserError if no trial has finite scores.
    """
    finite = [trial for trial in trials if trial.scores and all(map(math.isfinite, trial.scores.values()))]
    if not finite:
        raise UserError(
            "tune: no trial of an arm has finite scores for all seeds; see the logs of the trials, and change the range"
        )
    return max(finite, key=lambda trial: trial.mean if higher_is_better else -trial.mean)


def edge_values(grid: Mapping[str, Sequence[Any]], best: Values) -> dict[str, tuple[Any, Any]]:
    """Return the edges at which the best values of an arm are: by key, the edge and the next value within the range.

    Only keys with at least two values that are positive numbers have edges.
    """
    edges = {}
    for key, values in grid.items():
        if len(values) < 2 or not all(_is_positive(value) for value in values):
            continue
        ordered = sorted(values)
        if best[key] == ordered[0]:
            edges[key] = (ordered[0], ordered[1])
        elif best[key] == ordered[-1]:
            edges[key] = (ordered[-1], ordered[-2])
    return edges


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def value_beyond(edge: float, inner: float) -> float:
    """Return the value beyond the edge of a range that continues its last ratio; an integer if both are integers."""
    beyond = float(f"{edge * edge / inner:.4g}")
    if isinstance(edge, int) and isinstance(inner, int):
        return max(1, round(beyond))
    return beyond


def describe(study: Study, tune: TuneConfig) -> str:
    """Return how many trials the tuning has, as a line of the plan."""
    counts = [len(combinations(tune.grid(arm))) for arm in study.config.arms]
    return (
        f"tuning first: {sum(counts)} trials ({', '.join(map(str, counts))} by arm) x {len(tune.seeds)} seeds = "
        f"{sum(counts) * len(tune.seeds)} runs; the arms below have the values before the tuning"
    )


class _Planned(NamedTuple):
    """The study whose arms are the trials, and its runs."""

    study: Study
    matching: Matching
    runs: list[Run]
    record: StudyRecord

    @property
    def is_done(self) -> bool:
        """Whether all runs are trained and evaluated."""
        return all(map(is_done, self.runs))


class Tuning:
    """The trials of a study."""

    def __init__(self, study: Study, corpora: dict[str, dict[str, Any]], record: StudyRecord):
        assert study.config.tune is not None  # the caller has checked it
        self.study, self.corpora, self.record = study, corpora, record
        self.tune: TuneConfig = study.config.tune
        self.extensions: list[dict[str, list[Any]]] = record.tune.setdefault("extensions", [])
        (study.folder / FOLDER).mkdir(parents=True, exist_ok=True)
        self.rows = _validation_rows(study)

    @property
    def arms(self) -> list[str]:
        """Arms of the study."""
        return list(self.study.config.arms)

    def grid(self, arm: str) -> dict[str, list[Any]]:
        """Return the keys of an arm and their values, with the values that extensions have added."""
        added = {
            key: [value for extension in self.extensions for value in extension.get(key, [])] for key in self.tune.keys
        }
        return {key: [*values, *added.get(key, [])] for key, values in self.tune.grid(arm).items()}

    def trials_study(self) -> Study:
        """Return the study whose arms are the trials."""
        config = self.study.config
        trials = {
            trial_name(arm, values): config.arms[arm] | values | self._scored_on_validation_rows(arm)
            for arm in self.arms
            for values in combinations(self.grid(arm))
        }
        first = trial_name(config.baseline, combinations(self.grid(config.baseline))[0])
        changes: dict[str, Any] = {
            "name": FOLDER,
            "output_dir": str(self.study.folder),
            "seeds": self.tune.seeds,
            "arms": trials,
            "baseline": first,
            "primary": None,
            "tune": None,
            "power": None,
        }
        if config.matched_by == "seconds":
            changes["matched_by"] = "flops"  # the speed of each trial is not measured
        return Study(config.model_copy(update=changes), self.study.base)

    def _scored_on_validation_rows(self, arm: str) -> dict[str, Any]:
        """Return the dotted keys that make the task of the metric score the validation rows, without other tasks."""
        task = _metric_task(self.study, self.study.run_config(arm, self.tune.seeds[0]))
        options = task.model_dump(mode="json", exclude_none=True, exclude={"validation"}) | {
            "test": self.rows["source"]
        }
        return {"evaluation": {"tasks": [options]}, "data.decontaminate": False}

    def run(self, launcher_dir: Path, processes: ProcessRunner) -> int | None:
        """Run the trials, extend the ranges, and record the best values.

        Returns None, or the exit code of the study if trials are missing.
        """
        self._record_plan()
        while True:
            planned = self._plan()
            if not planned.is_done:
                code = self._run_trials(planned, launcher_dir, processes)
                if code or not planned.is_done:
                    return code
            trials = {arm: self._read_trials(planned, arm) for arm in self.arms}
            if len(self.extensions) >= self.tune.extensions or not self._extend(trials):
                break
        self._record_results(trials)
        return None

    def _plan(self) -> "_Planned":
        """Return the trials of all values, checked and recorded as a study."""
        study = self.trials_study()
        matching = Matching(study, {name: self.corpora[self._arm_of(name)] for name in study.config.arms})
        runs = make_runs(study, matching, {})
        check_runs(runs)
        save_records(runs)
        record = StudyRecord(study.folder)
        record.describe(
            study,
            {name: matching.overrides(arm, {}) for name, arm in matching.arms.items()},
            {name: arm.flops_per_token for name, arm in matching.arms.items()},
        )
        return _Planned(study, matching, runs, record)

    def _run_trials(self, planned: "_Planned", launcher_dir: Path, processes: ProcessRunner) -> int:
        study, matching, runs, record = planned
        logger.info(f"tuning: {len(study.config.arms)} trials x {len(self.tune.seeds)} seeds in {study.folder}")
        if study.config.slurm:
            code = submit_runs(study.folder, launcher_dir, study.config.slurm, runs, record)
            logger.info("run the same command again when these jobs have ended; the compared runs are submitted then")
            return code
        seconds = seconds_per_flop(study, matching, runs, record, launcher_dir, processes)
        if processes.stopped:
            return EXIT_CODE_STOPPED
        self._print_hours(matching, runs, seconds)
        return run_locally(study, launcher_dir, runs, record, processes)

    def _print_hours(self, trials: Matching, runs: list[Run], seconds: float) -> None:
        """Print the estimated hours of the missing trials and of the compared runs, from the seconds of a FLOP."""
        missing = sum(run.flops for run in runs if not is_done(run))
        seeds = self.study.config.seeds
        per_run = trials.baseline.flops_per_token * trials.base_tokens
        compared = per_run * len(self.arms) * len(seeds)
        print(
            f"about {seconds * missing / 3600:.1f} hours for the trials and {seconds * compared / 3600:.1f} hours for "
            f"{len(self.arms)} arms x {len(seeds)} seeds; start-up and evaluation come on top of it unless runs of "
            "this study have been timed, and an extension of a range adds trials",
            flush=True,
        )

    def _arm_of(self, trial: str) -> str:
        return next(
            arm for arm in self.arms for values in combinations(self.grid(arm)) if trial_name(arm, values) == trial
        )

    def _read_trials(self, planned: "_Planned", arm: str) -> list[Trial]:
        metric = planned.study.metric
        found = {(run.arm, run.seed): read_run(run.folder) for run in planned.runs}
        trials = []
        for values in combinations(self.grid(arm)):
            by_seed = {seed: found[trial_name(arm, values), seed] for seed in self.tune.seeds}
            scores = {seed: metric.final(run, metric.common_settings([run])) for seed, run in by_seed.items()}
            trials.append(Trial(values, {seed: score for seed, score in scores.items() if score is not None}))
        return trials

    def _best(self, trials: list[Trial]) -> Trial:
        return best_trial(trials, bool(self.study.config.metric.higher_is_better))

    def _extend(self, trials: dict[str, list[Trial]]) -> bool:
        """Extend the ranges of the common keys at which an arm is best at an edge; return whether there are any."""
        extension: dict[str, list[Any]] = {}
        for arm in self.arms:
            for key, (edge, inner) in edge_values(self.grid(arm), self._best(trials[arm]).values).items():
                beyond = value_beyond(edge, inner)
                if key not in self.tune.keys or beyond in [*self.grid(arm)[key], *extension.get(key, [])]:
                    continue
                extension.setdefault(key, []).append(beyond)
                logger.info(f"tuning: {arm} is best at {key}={edge}, the edge; {beyond} is added for all arms")
        if extension:
            self.extensions.append(extension)
            self.record.save()
        return bool(extension)

    def _record_plan(self) -> None:
        """Record the ranges, seeds, metric and rows of the tuning before the first score exists."""
        plan = {
            "grids": {arm: self.tune.grid(arm) for arm in self.arms},
            "seeds": self.tune.seeds,
            "compared_seeds": self.study.config.seeds,
            "extensions": self.tune.extensions,
            "metric": str(self.study.metric),
            "primary": self.study.config.primary,
            "rows": self.rows,
        }
        plans = self.record.tune.setdefault("plans", [])
        if not plans or {key: plans[-1][key] for key in plan} != plan:
            plans.append({"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")} | plan)
            self.record.save()

    def _record_results(self, trials: dict[str, list[Trial]]) -> None:
        best = {arm: self._best(trials[arm]) for arm in self.arms}
        self.record.tune |= {
            "trials": {
                arm: [{"values": trial.values, "scores": trial.scores} for trial in trials[arm]] for arm in self.arms
            },
            "best": {arm: trial.values for arm, trial in best.items()},
            "at_edge": {arm: list(edge_values(self.grid(arm), trial.values)) for arm, trial in best.items()},
        }
        self.record.save()
        for arm, trial in best.items():
            chosen = ", ".join(f"{key}={value}" for key, value in trial.values.items())
            logger.info(f"tuning: {arm}: {chosen or 'nothing to choose'} ({self.study.metric} {trial.mean:.4f})")


def with_best_values(study: Study, record: StudyRecord) -> Study:
    """Return the study whose arms have the best values of the tuning."""
    arms = {arm: changes | record.tune["best"][arm] for arm, changes in study.config.arms.items()}
    return Study(study.config.model_copy(update={"arms": arms}), study.base)


def _metric_task(study: Study, config: RunConfig) -> TaskConfig:
    return next(task for task in config.evaluation.tasks if task.title == study.config.metric.task)


def _validation_rows(study: Study) -> dict[str, Any]:
    """Return the source of the validation rows, its checksum and where the rows come from.

    Without `validation` of the task, the rows are the validation split of the corpus, written to a file. Raises
    UserError if there are no rows, or if they are the test rows.
    """
    base = study.run_config(study.config.baseline, study.config.seeds[0])
    task = _metric_task(study, base)
    if not isinstance(task, RowTask):
        raise UserError(f"tune cannot use the task {task.title}, because it has no rows; choose another metric")
    if task.validation is not None:
        source: Any = task.model_dump(mode="json", exclude_none=True)["validation"]
        path = Path(source if isinstance(source, str) else source.get("path", ""))
        checksum = sha256_file(path) if path.is_file() else None
        if task.test == task.validation or (checksum and _is_same_file(task.test, checksum)):
            raise UserError(
                f"evaluation.tasks: validation and test of {task.title} are the same rows; tune on rows that are not "
                "tested"
            )
        return {"source": source, "sha256": checksum, "origin": f"validation of {task.title}"}
    corpus = _open_split(base)
    path = study.folder / FOLDER / ROWS_FILE
    texts = (
        tuple(corpus.tokenizer.decode(ids) for ids in corpus.tokens_by_view(record).values())
        for record in range(min(len(corpus), task.rows or len(corpus)))
    )
    write_views(path, base.data.views, (row for row in texts if all(row)))
    return {"source": str(path), "sha256": sha256_file(path), "origin": "the validation split of the corpus"}


def _open_split(base: RunConfig) -> Corpus:
    try:
        return Corpus(base.data.path, "validation")
    except (KeyError, UserError):
        raise UserError(
            "tune needs rows that are neither trained on nor tested, but the task of the metric has no `validation`, "
            f"and {base.data.path} no validation split: set evaluation.tasks.N.validation, or data.validation_fraction"
        ) from None


def _is_same_file(test: Any, checksum: str) -> bool:
    path = Path(test if isinstance(test, str) else getattr(test, "path", "") or "")
    return path.is_file() and sha256_file(path) == checksum
