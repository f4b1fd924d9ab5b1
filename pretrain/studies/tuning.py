"""Tuning of the arms of a study, on rows that are neither trained on nor tested, before the runs that are compared.

Each combination of values of an arm is a trial: an arm of a study within the study, in the folder `tuning`, with the
seeds of the tuning. If the best value of an arm is at the edge of its range, the range is extended for all arms.
"""

import logging
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.utils.console import UserError
from pretrain.config import RunConfig
from pretrain.report.records import count_scored, find_run, record_path
from pretrain.report.runs import read_run
from pretrain.report.sensitivity import is_number
from pretrain.studies.calibration import seconds_per_flop
from pretrain.studies.config import Study, TuneConfig, Values, combinations, run_name
from pretrain.studies.matching import Matching
from pretrain.studies.plan import check_runs, make_runs
from pretrain.studies.processes import ProcessRunner
from pretrain.studies.record import Run, StudyRecord, now
from pretrain.studies.runner import EXIT_CODE_STOPPED, is_done, run_locally, save_records
from pretrain.studies.slurm import submit_runs
from pretrain.studies.tuning_rows import write_rows
from pretrain.tasks.options import TaskConfig

logger = logging.getLogger(__name__)

FOLDER = "tuning"
"""Folder of the trials in the study folder, which is a study folder too."""


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

    Only keys with at least two values that are numbers have edges.
    """
    edges = {}
    for key, values in grid.items():
        if len(values) < 2 or not all(map(is_number, values)):
            continue
        ordered = sorted(values)
        if best[key] == ordered[0]:
            edges[key] = (ordered[0], ordered[1])
        elif best[key] == ordered[-1]:
            edges[key] = (ordered[-1], ordered[-2])
    return edges


def value_beyond(edge: float, inner: float) -> float | None:
    """Return the value beyond the edge of a range that continues its last ratio; an integer if both are integers.

    Returns None if there is no ratio, because one of them is not positive.
    """
    if edge <= 0 or inner <= 0:
        return None
    beyond = float(f"{edge * edge / inner:.4g}")
    if isinstance(edge, int) and isinstance(inner, int):
        return max(1, round(beyond))
    return beyond


def describe(study: Study, tune: TuneConfig) -> str:
    """Return how many trials the tuning has, as a line of the plan."""
    counts = [len(combinations(tune.grid(arm))) for arm in study.config.arms]
    return (
        f"tuning first: {sum(counts)} trials ({', '.join(map(str, counts))} by arm) x {_seeds(tune.seeds)} = "
        f"{sum(counts) * len(tune.seeds)} runs; the arms have the values before the tuning below"
    )


def _seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"


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
        base, *others = [
            study.run_config(arm, study.config.seeds[0], corpora[arm])
            for arm in sorted(study.config.arms, key=lambda arm: arm != study.config.baseline)
        ]
        folders = dict.fromkeys(config.data.path for config in (base, *others))
        self.rows = write_rows(base, _metric_task(study, base), folders, study.folder / FOLDER)

    @property
    def arms(self) -> list[str]:
        """Arms of the study."""
        return list(self.study.config.arms)

    def grid(self, arm: str) -> dict[str, list[Any]]:
        """Return the keys of an arm and their values, with the values that extensions have added."""
        used = self.extensions[: self.tune.extensions]
        added = {key: [value for extension in used for value in extension.get(key, [])] for key in self.tune.keys}
        return {key: list(dict.fromkeys([*values, *added.get(key, [])])) for key, values in self.tune.grid(arm).items()}

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
            "test": self.rows.source.model_dump(mode="json", exclude_none=True)
        }
        return {"evaluation": {"tasks": [options]}, "data.decontaminate": False}

    def run(self, launcher_dir: Path, processes: ProcessRunner) -> int | None:
        """Run the trials, extend the ranges, and record the best values.

        Returns None, or the exit code of the study if trials are missing.
        """
        planned = self._plan()
        self._record_plan()
        while True:
            if not planned.is_done:
                code = self._run_trials(planned, launcher_dir, processes)
                if code or not planned.is_done:
                    return code
            trials = {arm: self._read_trials(planned, arm) for arm in self.arms}
            if len(self.extensions) >= self.tune.extensions or not self._extend(trials):
                break
            planned = self._plan()
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
        logger.info(f"tuning: {len(study.config.arms)} trials x {_seeds(self.tune.seeds)} in {study.folder}")
        if study.config.slurm:
            self._print_effort(runs, None)
            code = submit_runs(study.folder, launcher_dir, study.config.slurm, runs, record)
            logger.info("run the same command again when these jobs have ended; the compared runs are submitted then")
            return code
        seconds = seconds_per_flop(study, matching, runs, record, launcher_dir, processes)
        if processes.stopped:
            return EXIT_CODE_STOPPED
        self._print_effort(runs, seconds)
        code = run_locally(study, launcher_dir, runs, record, processes)
        if code != EXIT_CODE_STOPPED and code and self.extensions:
            logger.warning(
                "tuning: the compared runs start when all trials are done; if a trial with an extended value can "
                f"never finish, set tune.extensions below {min(len(self.extensions), self.tune.extensions)}"
            )
        return code

    def _print_effort(self, runs: list[Run], seconds_per_flop: float | None) -> None:
        """Print the estimated hours of the missing trials and of the compared runs; FLOPs if hours are unknown."""
        missing = sum(run.flops for run in runs if not is_done(run))
        flops_of_arm: dict[str, list[float]] = {}
        for run in runs:
            flops_of_arm.setdefault(self._arm_of(run.arm), []).append(run.flops)
        compared = sum(map(statistics.fmean, flops_of_arm.values()))  # with one seed
        power, seeds = self.study.config.power, self.study.config.seeds
        effort = [missing, compared * len(seeds), compared * power.most if power else 0]
        parallel = min(self.study.config.parallel_runs, len(runs))
        shown = [
            f"{flops:.3g} FLOPs"
            if seconds_per_flop is None
            else f"{seconds_per_flop * flops / parallel / 3600:.1f} hours"
            for flops in effort
        ]
        further = f" of the pilot, then at most {shown[2]} for the further seeds" if power else ""
        print(
            f"about {shown[0]} for the trials and {shown[1]} for {len(self.arms)} arms x {_seeds(seeds)}{further}; "
            "start-up and evaluation come on top of it unless runs of this study have been timed, and an extension of "
            "a range adds trials",
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
                if beyond is None:
                    logger.info(f"tuning: {arm} is best at {key}={edge}, the edge; it has no ratio to {inner}")
                    continue
                if not self._is_valid(arm, key, beyond):
                    logger.info(f"tuning: {arm} is best at {key}={edge}, the edge; {beyond} is not a valid value")
                    continue
                if key not in self.tune.keys or beyond in [*self.grid(arm)[key], *extension.get(key, [])]:
                    continue
                extension.setdefault(key, []).append(beyond)
                logger.info(f"tuning: {arm} is best at {key}={edge}, the edge; {beyond} is added for all arms")
        if extension:
            self.extensions.append(extension)
            self.record.save()
        return bool(extension)

    def _is_valid(self, arm: str, key: str, value: Any) -> bool:
        """Return whether a run of an arm may have a value, such as a fraction below 1."""
        try:
            self.study.run_config(arm, self.tune.seeds[0], {key: value})
        except UserError:
            return False
        return True

    def _record_plan(self) -> None:
        """Record the ranges, seeds, metric and rows of the tuning before the first score exists."""
        plan = {
            "grids": {arm: self.tune.grid(arm) for arm in self.arms},
            "seeds": self.tune.seeds,
            "compared_seeds": self.study.config.seeds,
            "extensions": self.tune.extensions,
            "metric": str(self.study.metric),
            "primary": self.study.config.primary,
            "rows": self.rows.description,
        }
        plans = self.record.tune.setdefault("plans", [])
        if not plans or {key: plans[-1].get(key) for key in plan} != plan:
            folder = self.study.folder
            plans.append({"time": now(), "scored": count_scored(folder) + count_scored(folder / FOLDER)} | plan)
            self.record.save()

    def _record_results(self, trials: dict[str, list[Trial]]) -> None:
        best = {arm: self._best(trials[arm]) for arm in self.arms}
        self._check_unchanged({arm: trial.values for arm, trial in best.items()})
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

    def _check_unchanged(self, best: dict[str, Values]) -> None:
        """Raise UserError if new trials have changed the best values of an arm that has compared runs."""
        for arm, before in self.record.tune.get("best", {}).items():
            folders = [self.study.folder / run_name(arm, seed) for seed in self.study.config.seeds]
            has_runs = any(find_run(run_dir, record_path(run_dir.parent, run_dir.name)) for run_dir in folders)
            if arm in best and best[arm] != before and has_runs:
                raise UserError(
                    f"tune: with the trials added since, {arm} is best with {best[arm]}, but its runs were trained "
                    f"with {before}; set tune.extensions to a lower number to keep the earlier ranges, or start a "
                    "study with another name, to which you may copy the folder of the trials, tuning"
                )


def with_best_values(study: Study, record: StudyRecord) -> Study:
    """Return the study whose arms have the best values of the tuning."""
    arms = {arm: changes | record.tune["best"][arm] for arm, changes in study.config.arms.items()}
    return Study(study.config.model_copy(update={"arms": arms}), study.base)


def _metric_task(study: Study, config: RunConfig) -> TaskConfig:
    return next(task for task in config.evaluation.tasks if task.title == study.config.metric.task)
