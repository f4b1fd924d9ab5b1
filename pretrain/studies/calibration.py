"""Calibration: measures the speed of an arm in a short run that is launched like the other runs of the arm."""

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

from data_prep.utils.console import UserError
from pretrain.config import RunConfig, dump_config
from pretrain.report.records import record_path
from pretrain.report.runs import is_run
from pretrain.run_folder import read_metrics
from pretrain.sections import BUDGETS
from pretrain.studies.config import Study, StudyConfig, run_name
from pretrain.studies.matching import Arm
from pretrain.studies.processes import ProcessRunner
from pretrain.studies.record import StudyRecord
from pretrain.studies.runner import log_path, write_run_config
from pretrain.studies.slurm import submit, wait_for

logger = logging.getLogger(__name__)

STEPS = 40
"""Number of steps of a calibration run."""
UNTIMED_STEPS = 10
"""Number of initial steps that the speed does not include."""
NEVER = 10**9
"""Interval that no calibration run reaches, in steps."""


def calibration_changes(arm: Arm, folder: str) -> dict[str, Any]:
    """Return the dotted keys that turn a run of an arm into its calibration run in `folder`."""
    budgets = {f"train.{budget}": None for budget in BUDGETS if getattr(arm.config.train, budget) is not None}
    return (
        arm.overrides
        | budgets
        | {
            "train.steps": STEPS,
            "name": arm.name,
            "output_dir": folder,
            "evaluation": {},
            "checkpoint": {"every": NEVER, "keep": 1},
            "monitor.log_every": 1,
            "monitor.validate_every": NEVER,
            "monitor.tensorboard": False,
            "monitor.gradients_every": 0,
        }
    )


def fingerprint(config: RunConfig, study: StudyConfig) -> str:
    """Return a hash of what determines the speed of a run: its configuration, and the options of its launch."""
    launch_options = study.slurm.train if study.slurm else study.launch
    return hashlib.sha256(f"{dump_config(config)}\n{launch_options}".encode()).hexdigest()


def read_speed(arm: Arm, run_dir: Path) -> dict[str, Any]:
    """Return the measured speed of a finished calibration run, and delete its checkpoints.

    Raises UserError if the run did not finish.
    """
    lines = read_metrics(run_dir)
    if not lines or lines[-1]["step"] < STEPS:
        raise UserError(
            f"the calibration of {arm.name} did not finish; see the reason in {run_dir} and the log of the calibration"
        )
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    first = lines[UNTIMED_STEPS - 1]
    last = lines[-1]
    return {
        "steps": f"{UNTIMED_STEPS + 1} to {STEPS}",
        "tokens_per_second": (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"]),
    }


def calibrate(
    study: Study, arms: list[Arm], record: StudyRecord, launcher_dir: Path, processes: ProcessRunner
) -> dict[str, float]:
    """Measure the speed of each arm, and return the speeds in tokens per second.

    An earlier measurement is kept if the settings are unchanged, or if the arm has runs, whose budgets depend on it.
    Raises UserError if a calibration does not finish.
    """
    folder = study.folder / "calibration"
    for arm in arms:
        config = study.run_config(arm.name, study.config.seeds[0], calibration_changes(arm, str(folder)))
        started_as = fingerprint(config, study.config)
        earlier = record.calibration.get(arm.name, {})
        names = [run_name(arm.name, seed) for seed in study.config.seeds]
        has_runs = any(is_run(study.folder / name) or record_path(study.folder, name).is_file() for name in names)
        if processes.stopped or (earlier and (has_runs or earlier.get("started_as") == started_as)):
            continue
        shutil.rmtree(config.run_dir, ignore_errors=True)
        log = log_path(study.folder, f"calibration-{arm.name}")
        path = write_run_config(folder, config)
        logger.info(f"measuring the speed of {arm.name} over {STEPS} steps; output in {log}")
        if study.config.slurm:
            job = submit(
                launcher_dir / "slurm" / "pretrain.sbatch",
                study.config.slurm.train,
                f"calibration-{arm.name}",
                log,
                path,
            )
            wait_for(job, lambda: processes.stopped is not None)
        else:
            processes.train(launcher_dir, study.config.launch, path, log)
        if not processes.stopped:
            record.calibration[arm.name] = {"started_as": started_as} | read_speed(arm, config.run_dir)
            record.save()
    return {name: calibration["tokens_per_second"] for name, calibration in record.calibration.items()}
