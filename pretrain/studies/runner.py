"""Runs of a study on this machine, one after another.

Finished runs are skipped and interrupted runs resume. A failure is reported, and the next run starts.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from data_prep.utils.console import UserError, duration
from data_prep.utils.files import write_text
from pretrain.config import RunConfig, config_values, dump_config
from pretrain.evaluation.results import evaluated_steps, read_results, result_key
from pretrain.report.records import read_record, write_record
from pretrain.report.runs import comparison_key, read_run
from pretrain.run_folder import list_steps, read_status
from pretrain.studies.config import Study
from pretrain.studies.processes import ProcessRunner
from pretrain.studies.record import Run, StudyRecord

logger = logging.getLogger(__name__)

EXIT_CODE_STOPPED = 75
"""Exit code of a study that was stopped and can be resumed; the same as for a run."""


def write_run_config(folder: Path, config: RunConfig) -> Path:
    """Write the configuration of a run to the study folder and return the path of the file."""
    path = folder / "configs" / f"{config.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dump_config(config))
    return path


def rewrite_run_config(run: Run) -> None:
    """Update config.yaml of a trained run to the tasks of the study, which may have changed since the training.

    All other settings have been checked to be unchanged.
    """
    write_text(run.run_dir / "config.yaml", dump_config(run.config))


def log_path(folder: Path, name: str) -> Path:
    """Return the path of the log of a run's console output, and create the log folder."""
    (folder / "logs").mkdir(exist_ok=True)
    return folder / "logs" / f"{name}.log"


def is_trained(run: Run) -> bool:
    """Return whether the training of a run is finished."""
    return read_status(run.run_dir).get("status") == "finished" and bool(list_steps(run.run_dir / "checkpoints"))


def is_done(run: Run) -> bool:
    """Return whether a run is trained and all its tasks are evaluated at its last step, here or in its record."""
    return _is_done_here(run) or (run.record.is_file() and not missing_results(run))


def _is_done_here(run: Run) -> bool:
    tasks = run.config.evaluation.tasks
    return is_trained(run) and (
        not tasks or list_steps(run.run_dir / "checkpoints")[-1] in evaluated_steps(run.run_dir, tasks)
    )


def missing_results(run: Run) -> list[str]:
    """Return the tasks without a result at the last step in the record of a run.

    The files of a task may be in other places than when the record was written, but their contents must be equal.
    """
    folder = read_record(run.record)
    step = read_status(folder)["step"]
    config = config_values(run.config)
    recorded = {
        (result["task"], comparison_key(result | {"rows": None}, config))
        for result in read_results(folder)
        if result["step"] == step
    }
    wanted = [result_key(task, step) for task in run.config.evaluation.tasks]
    return [key["task"] for key in wanted if (key["task"], comparison_key(key, config)) not in recorded]


def save_records(runs: Sequence[Run]) -> None:
    """Write the records of the runs that are done on this machine."""
    for run in runs:
        if _is_done_here(run):
            write_record(run.run_dir, run.record)


def check_metric(study: Study, run: Run) -> None:
    """Raise UserError if a finished run lacks the metric of the study."""
    metric = study.metric
    finished_run = read_run(run.folder)
    if metric.final(finished_run, metric.common_settings([finished_run])) is None:
        names = dict.fromkeys(
            name for result in finished_run.results if result["task"] == metric.task for name in result["metrics"]
        )
        raise UserError(
            f"{run.name} has no {metric} at its last step; {metric.task} reports {', '.join(names) or 'nothing'}. "
            "Set metric in the study file to a metric that its tasks report; finished runs are kept"
        )


def run_locally(
    study: Study, launcher_dir: Path, runs: list[Run], record: StudyRecord, processes: ProcessRunner
) -> int:
    """Train and evaluate, in order, the runs that are not done, and return the exit code of the study.

    Raises UserError if a run lacks the study's metric.
    """
    folder = study.folder
    failed: list[str] = []
    for number, run in enumerate(runs, 1):
        if is_done(run):
            check_metric(study, run)
            continue
        log = log_path(folder, run.name)
        logger.info(f"[{number}/{len(runs)}] {run.name}{_time_left(runs, record)}; output in {log}")
        started = time.monotonic()
        problem = _train_and_evaluate(run, study, launcher_dir, log, processes)
        seconds = time.monotonic() - started
        record.wall_seconds[run.name] = round(record.wall_seconds.get(run.name, 0) + seconds, 1)
        record.save()
        if processes.stopped:
            logger.info(f"stopped by {processes.stopped.name}; run the same command to resume")
            return EXIT_CODE_STOPPED
        if problem:
            failed.append(run.name)
            logger.warning(
                f"[{number}/{len(runs)}] {run.name} FAILED: {problem}; see {log}. "
                "The other runs continue; run the same command later to try it again"
            )
        else:
            logger.info(f"[{number}/{len(runs)}] {run.name} done in {duration(seconds)}")
            save_records([run])
            check_metric(study, run)
    if failed:
        logger.warning(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")
    return 1 if failed else 0


def _train_and_evaluate(run: Run, study: Study, launcher_dir: Path, log: Path, processes: ProcessRunner) -> str | None:
    """Train and evaluate a run. Returns None if it is done, else the reason as message text."""
    if not is_trained(run):
        code = processes.train(launcher_dir, study.config.launch, write_run_config(study.folder, run.config), log)
        if not is_trained(run):
            status = read_status(run.run_dir)
            return f"training ended with exit code {code}" + (f" ({status['reason']})" if status.get("reason") else "")
    if not processes.stopped and not is_done(run):
        rewrite_run_config(run)
        code = processes.evaluate(launcher_dir, run.run_dir, log)
        if not is_done(run):
            return f"the evaluation ended with exit code {code}"
    return None


def _time_left(runs: list[Run], record: StudyRecord) -> str:
    """Return a text with the estimated time left for all runs, based on the seconds per FLOP of finished runs.

    Returns "" if no finished run was timed.
    """
    seconds_per_flop = wall_seconds_per_flop(runs, record)
    if seconds_per_flop is None:
        return ""
    flops_left = sum(run.flops for run in runs if not is_done(run))
    return f", about {duration(flops_left * seconds_per_flop)} left for all runs"


def wall_seconds_per_flop(runs: list[Run], record: StudyRecord) -> float | None:
    """Return the recorded wall-clock seconds of the finished runs per FLOP; None if no finished run was timed."""
    timed = [run for run in runs if run.name in record.wall_seconds and is_done(run)]
    if not timed:
        return None
    return sum(record.wall_seconds[run.name] for run in timed) / sum(run.flops for run in timed)
