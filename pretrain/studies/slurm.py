"""Runs of a study as Slurm jobs.

Each run has a training job, which requeues itself, and an evaluation job that starts after it.
"""

import logging
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data_prep.utils.console import UserError
from pretrain.studies.config import SlurmConfig
from pretrain.studies.record import Run, StudyRecord
from pretrain.studies.runner import is_done, is_trained, log_path, rewrite_run_config, write_run_config

logger = logging.getLogger(__name__)


def submit_runs(folder: Path, launcher_dir: Path, slurm: SlurmConfig, runs: list[Run], record: StudyRecord) -> int:
    """Submit jobs for the runs that are neither done nor queued; return the exit code 0."""
    submitted = 0
    for run in runs:
        if is_done(run) or any(_is_queued(job) for job in record.jobs.get(run.name, [])):
            continue
        log = log_path(folder, run.name)
        jobs: list[int] = []
        if is_trained(run):
            rewrite_run_config(run)
        else:
            jobs.append(
                submit(
                    launcher_dir / "slurm" / "pretrain.sbatch",
                    slurm.train,
                    run.name,
                    log,
                    write_run_config(folder, run.config),
                )
            )
        if run.config.evaluation.tasks:
            dependency = [f"--dependency=afterany:{jobs[0]}"] if jobs else []
            jobs.append(
                submit(
                    launcher_dir / "slurm" / "evaluate.sbatch",
                    slurm.evaluate,
                    f"evaluate-{run.name}",
                    log,
                    run.run_dir,
                    extra_options=dependency,
                )
            )
        record.jobs[run.name] = jobs
        record.save()
        submitted += 1
        logger.info(f"{run.name}: job{'s' * (len(jobs) > 1)} {', '.join(map(str, jobs))}")
    done = sum(map(is_done, runs))
    logger.info(
        f"{submitted} runs submitted, {done} of {len(runs)} done; "
        "run the same command again to resubmit failed runs that have left the queue"
    )
    return 0


def submit(script: Path, options: str, name: str, log: Path, argument: Path, extra_options: Sequence[str] = ()) -> int:
    """Submit a job and return its number. Raises UserError if it cannot be submitted."""
    if not Path("launcher/run.py").is_file():
        raise UserError(
            "jobs start in the current folder, but it has no launcher/run.py; start the study from the project folder"
        )
    done = _call(
        "sbatch",
        "--parsable",
        f"--job-name={name}",
        f"--output={log}",
        *extra_options,
        *shlex.split(options),
        str(script),
        str(argument),
    )
    if done.returncode:
        raise UserError(
            f"sbatch refused {name}: {' '.join(done.stderr.split())}; fix the slurm options in the study file"
        )
    return int(done.stdout.partition(";")[0])


def wait_for(job: int, stopped: Callable[[], bool]) -> None:
    """Wait until a job has left the queue, or until `stopped()` is true."""
    while not stopped() and _is_queued(job):
        time.sleep(5)


def _is_queued(job: int) -> bool:
    """Return whether a job is waiting or running. Slurm reports jobs that have ended only for a while."""
    return bool(_call("squeue", "--noheader", f"--jobs={job}", "--format=%T").stdout.strip())


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(
            f"cannot start {command[0]} ({error.strerror}), but the study file sets slurm; "
            "start the study on a machine with Slurm, or remove slurm"
        ) from None
