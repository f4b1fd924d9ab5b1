"""Calibration: measures the speeds of arms in short runs that are launched like the other runs of the arms.

The arms take turns in several rounds, and the order rotates from round to round. The runs of a round are compared with
each other, so a change of the machine's speed between rounds has little effect on the ratio of two arms.

On CPU, the speed is measured in processor time, which does not include waiting for other processes. On a GPU, it is
measured in wall-clock time, because the GPU is the resource. Every step waits for the GPU when the losses are read.
"""

import hashlib
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.utils.console import UserError
from pretrain.config import RunConfig, dump_config
from pretrain.report.records import record_path
from pretrain.report.runs import is_run
from pretrain.run_folder import read_metrics
from pretrain.studies.config import Study, StudyConfig, run_name
from pretrain.studies.matching import Arm, Matching
from pretrain.studies.processes import ProcessRunner
from pretrain.studies.record import Run, StudyRecord
from pretrain.studies.runner import log_path, run_environments, wall_seconds_per_flop, write_run_config
from pretrain.studies.slurm import submit, wait_for
from pretrain.studies.speeds import PairedRatio, mean_over_levels, paired_ratio, read_ratios

logger = logging.getLogger(__name__)

ROUNDS = 3
"""Number of rounds in which every arm is measured once."""
STEPS = 40
"""Number of steps of a calibration run."""
UNTIMED_STEPS = 10
"""Number of initial steps that the speed does not include; also the interval of logged steps."""
NEVER = 10**9
"""Interval that no calibration run reaches, in steps."""
OFF = [0.99, 1.0]
"""Value of `objective.active` with which the terms are switched off in all steps of a calibration run.

The last step begins before 99% of the budget is used, so its records carry no pairs either.
"""


class SecondsPerToken(NamedTuple):
    """Time per corpus token in a short run."""

    wall: float
    processor: float
    """0 on a GPU."""


def calibration_changes(arm: Arm, folder: str) -> dict[str, Any]:
    """Return the dotted keys that turn a run of an arm into a calibration run in `folder`."""
    return (
        arm.overrides
        | {f"train.{key}": value for key, value in arm.config.train.without_budget().items()}
        | {
            "train.steps": STEPS,
            "name": arm.name,
            "output_dir": folder,
            "evaluation": {},
            "checkpoint": {"every": NEVER, "keep": 1},
            "monitor.log_every": UNTIMED_STEPS,
            "monitor.validate_every": NEVER,
            "monitor.tensorboard": False,
            "monitor.gradients_every": 0,
            "monitor.layers_every": 0,
        }
    )


def constant_dropout(config: RunConfig, level: float) -> dict[str, Any]:
    """Return the dotted keys that keep the dropout of a run's records at `level`; 1 switches the terms off."""
    values: dict[str, Any] = {"active": OFF if level == 1 else None, "weight_schedule": None}
    if level < 1:
        values["dropout"] = level
    return {f"objective.{key}": value for key, value in values.items() if key in type(config.objective).model_fields}


def fingerprint(config: RunConfig, study: StudyConfig) -> str:
    """Return a hash of what determines the speed of a run: its configuration, and the options of its launch."""
    launch_options = study.slurm.train if study.slurm else study.launch
    return hashlib.sha256(f"{dump_config(config)}\n{launch_options}".encode()).hexdigest()


def read_speed(run_dir: Path) -> SecondsPerToken:
    """Return the measured times of a finished calibration run, and delete its checkpoints.

    Raises UserError if the run did not finish.
    """
    lines = {line["step"]: line for line in read_metrics(run_dir)}
    if STEPS not in lines:
        raise UserError(
            f"the calibration run {run_dir.name} did not finish; see the reason in {run_dir} and the log of the run"
        )
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    first, last = lines[UNTIMED_STEPS], lines[STEPS]
    tokens = last["tokens"] - first["tokens"]
    return SecondsPerToken(*((last[key] - first[key]) / tokens for key in ("seconds", "processor_seconds")))


class Calibration:
    """Short runs of the arms of a study."""

    def __init__(self, study: Study, launcher_dir: Path, processes: ProcessRunner):
        self._study = study
        self._launcher_dir = launcher_dir
        self._processes = processes
        self._folder = study.folder / "calibration"

    def config(self, arm: Arm, changes: Mapping[str, Any]) -> RunConfig:
        """Return the configuration of a short run of an arm, changed by dotted keys."""
        seed = self._study.config.seeds[0]
        return self._study.run_config(arm.name, seed, calibration_changes(arm, str(self._folder)) | dict(changes))

    def measure(self, arms: list[Arm], number: int) -> dict[str, SecondsPerToken]:
        """Run every arm once, in this order, and return the times by arm; empty if the study was stopped.

        An arm whose dropout of the records changes during the run has two runs: at its lowest and highest dropout.
        """
        runs = {arm.name: self._configs(arm, number) for arm in arms}
        self._train([config for configs in runs.values() for config in configs])
        if self._processes.stopped:
            return {}
        measured = {}
        for arm in arms:
            times = [read_speed(config.run_dir) for config in runs[arm.name]]
            measured[arm.name] = times[0]
            if len(times) > 1:
                low, high = times
                measured[arm.name] = SecondsPerToken(
                    *(mean_over_levels(arm.dropout_levels, *pair) for pair in zip(low, high, strict=True))
                )
        return measured

    def _configs(self, arm: Arm, number: int) -> list[RunConfig]:
        name = f"{arm.name}-round{number}"
        levels = arm.dropout_levels
        if len(levels) < 2:
            return [self.config(arm, {"name": name})]
        return [
            self.config(arm, {"name": f"{name}-dropout{level:g}"} | constant_dropout(arm.config, level))
            for level in (min(levels), max(levels))
        ]

    def _train(self, configs: list[RunConfig]) -> None:
        jobs = []
        for config in configs:
            if self._processes.stopped:
                return
            shutil.rmtree(config.run_dir, ignore_errors=True)
            log = log_path(self._study.folder, f"calibration-{config.name}")
            path = write_run_config(self._folder, config)
            logger.info(f"{config.name}: {STEPS} steps to measure the speed; output in {log}")
            if slurm := self._study.config.slurm:
                script = self._launcher_dir / "slurm" / "pretrain.sbatch"
                jobs.append(submit(script, slurm.train, f"calibration-{config.name}", log, path))
            else:
                environment, *_ = run_environments(self._study.config.parallel_runs)
                self._processes.train(self._launcher_dir, self._study.config.launch, path, log, environment)
        for job in jobs:
            wait_for(job, lambda: self._processes.stopped is not None)


def calibrate(
    study: Study, matching: Matching, record: StudyRecord, launcher_dir: Path, processes: ProcessRunner
) -> dict[str, PairedRatio]:
    """Measure the speed of each arm relative to the baseline, and return the ratios.

    An earlier measurement is kept if the settings are unchanged, or if the arm has runs, whose budgets depend on it.
    The baseline is measured again with every arm that needs a measurement. Raises UserError if a run does not finish.
    """
    calibration = Calibration(study, launcher_dir, processes)
    baseline = matching.baseline
    started_as = {name: fingerprint(calibration.config(arm, {}), study.config) for name, arm in matching.arms.items()}
    hashes = {
        name: {"started_as": started_as[name], "baseline_started_as": started_as[baseline.name]} for name in started_as
    }
    known = read_ratios(record.calibration, baseline.name)
    pending = [
        arm
        for name, arm in matching.arms.items()
        if name not in known
        or (
            arm is not baseline
            and not any(_has_run(study.folder, run_name(name, seed)) for seed in study.config.seeds)
            and not hashes[name].items() <= record.calibration[name].items()
        )
    ]
    if not pending:
        return known
    arms = [baseline, *pending]
    rounds = []
    for number in range(ROUNDS):
        first = number % len(arms)
        logger.info(f"measuring the speed of {', '.join(arm.name for arm in arms)}: round {number + 1} of {ROUNDS}")
        rounds.append(calibration.measure(arms[first:] + arms[:first], number + 1))
        if processes.stopped:
            return known
    unit = "processor" if all(times.processor for measured in rounds for times in measured.values()) else "wall"
    times = {arm.name: [getattr(measured[arm.name], unit) for measured in rounds] for arm in arms}
    for arm in pending:
        ratio = paired_ratio(times[baseline.name], times[arm.name])
        logger.info(f"{arm.name} has {ratio} times the speed of {baseline.name}")
        record.calibration[arm.name] = hashes[arm.name] | {
            "baseline": baseline.name,
            "steps": f"{UNTIMED_STEPS + 1} to {STEPS}",
            "unit": "processor seconds" if unit == "processor" else "seconds",
            "seconds_per_token": times[arm.name],
            "baseline_seconds_per_token": times[baseline.name],
            "speed_ratio": ratio._asdict(),
        }
    record.save()
    return read_ratios(record.calibration, baseline.name)


def _has_run(folder: Path, name: str) -> bool:
    return is_run(folder / name) or record_path(folder, name).is_file()


def seconds_per_flop(
    study: Study,
    matching: Matching,
    runs: list[Run],
    record: StudyRecord,
    launcher_dir: Path,
    processes: ProcessRunner,
) -> float:
    """Return the wall-clock seconds of a run per FLOP of its training.

    They come from the recorded seconds of the finished runs among `runs`. Without any, they come from a short run of
    the baseline, which includes neither start-up nor evaluation. Returns NaN if the study was stopped during this run.
    Raises UserError if it does not finish.
    """
    recorded = wall_seconds_per_flop(runs, record)
    if recorded is not None:
        return recorded
    baseline = matching.baseline
    measured = Calibration(study, launcher_dir, processes).measure([baseline], 0)
    return measured[baseline.name].wall / baseline.flops_per_token if measured else math.nan
