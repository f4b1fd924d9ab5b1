"""The runs of a study here, one after another: what is finished is left alone, what was interrupted goes on, what fails is told and left."""

import time
from pathlib import Path

from data_prep.console import UserError, print_now
from data_prep.files import write_text
from pretrain.config import RunConfig, dump_config
from pretrain.evaluation.results import evaluated_steps
from pretrain.report.runs import read_run
from pretrain.run_folder import list_steps, read_status
from pretrain.studies.config import Study
from pretrain.studies.processes import ProcessRunner
from pretrain.studies.record import Run, StudyRecord
from pretrain.training.progress_line import duration

EXIT_CODE_STOPPED = 75
"""Exit code of a study that was stopped and can go on, as that of a run."""


def write_run_config(folder: Path, config: RunConfig) -> Path:
    """The configuration of a run as a file of the study's folder."""
    path = folder / "configs" / f"{config.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dump_config(config))
    return path


def rewrite_run_config(run: Run) -> None:
    """Write the configuration of a trained run anew: the base may name other tasks since; all else was checked to be the same."""
    write_text(run.run_dir / "config.yaml", dump_config(run.config))


def log_path(folder: Path, name: str) -> Path:
    """Where a run's console goes."""
    (folder / "logs").mkdir(exist_ok=True)
    return folder / "logs" / f"{name}.log"


def is_trained(run: Run) -> bool:
    """Whether a run has come to its end."""
    return read_status(run.run_dir).get("status") == "finished" and bool(list_steps(run.run_dir / "checkpoints"))


def is_done(run: Run) -> bool:
    """Whether a run is trained, and all its tasks evaluated at its last step."""
    tasks = run.config.evaluation.tasks
    return is_trained(run) and (
        not tasks or list_steps(run.run_dir / "checkpoints")[-1] in evaluated_steps(run.run_dir, tasks)
    )


def check_metric(study: Study, run: Run) -> None:
    """Raise UserError where a run that is done lacks the metric of the study."""
    metric, found = study.metric, read_run(run.run_dir)
    if metric.final(found, metric.common_settings([found])) is None:
        names = dict.fromkeys(
            name for result in found.results if result["task"] == metric.task for name in result["metrics"]
        )
        raise UserError(
            f"{run.name} has no {metric} at its last step; {metric.task} gives {', '.join(names) or 'nothing'}. Set metric in the study "
            "file: what has run stays"
        )


def run_locally(
    study: Study, launcher_dir: Path, runs: list[Run], record: StudyRecord, processes: ProcessRunner
) -> int:
    """Train and evaluate all runs in their order; the exit code of the study. Raises UserError where a run lacks the study's metric."""
    folder, failed = study.folder, []
    for number, run in enumerate(runs, 1):
        if is_done(run):
            check_metric(study, run)
            continue
        log = log_path(folder, run.name)
        print_now(f"[{number}/{len(runs)}] {run.name}{_left(runs, record)}; its output: {log}")
        started = time.monotonic()
        problem = _train_and_evaluate(run, study, launcher_dir, log, processes)
        seconds = time.monotonic() - started
        record.wall_seconds[run.name] = round(record.wall_seconds.get(run.name, 0) + seconds, 1)
        record.save()
        if processes.stopped:
            print_now(f"stopped by {processes.stopped.name}; the same command goes on")
            return EXIT_CODE_STOPPED
        if problem:
            failed.append(run.name)
            print_now(
                f"[{number}/{len(runs)}] {run.name} FAILED: {problem}; see {log}. The others go on; the same command tries it again"
            )
        else:
            print_now(f"[{number}/{len(runs)}] {run.name} done in {duration(seconds)}")
            check_metric(study, run)
    if failed:
        print_now(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")
    return 1 if failed else 0


def _train_and_evaluate(run: Run, study: Study, launcher_dir: Path, log: Path, processes: ProcessRunner) -> str | None:
    """None, or why the run is not done."""
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


def _left(runs: list[Run], record: StudyRecord) -> str:
    """The time that is left, from what the runs that are done took for their FLOPs."""
    done = [run for run in runs if is_done(run)]
    known = [run for run in done if run.name in record.wall_seconds]
    if not known:
        return ""
    left = sum(run.flops for run in runs if run not in done)
    seconds = left * sum(record.wall_seconds[run.name] for run in known) / sum(run.flops for run in known)
    return f", about {duration(seconds)} left for all"
