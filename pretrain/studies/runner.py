"""Runs of a study on this machine, one after another or several at a time.

Finished runs are skipped and interrupted runs resume. A failure is reported, and the next run starts.
"""

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
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


def run_environments(count: int) -> list[dict[str, str]]:
    """Return the environment variables of each of `count` runs that train at the same time on this machine.

    They assign a GPU to each run, in turn, or without GPUs a number of threads, unless OMP_NUM_THREADS is set. A single
    run keeps the environment.
    """
    if count == 1:
        return [{}]
    import torch  # imported late because it loads slowly

    gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",")[:gpus] if visible else [str(gpu) for gpu in range(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": names[number % gpus]} for number in range(count)]
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * count


def run_locally(
    study: Study, launcher_dir: Path, runs: list[Run], record: StudyRecord, processes: ProcessRunner
) -> int:
    """Train and evaluate, in order, the runs that are not done, and return the exit code of the study.

    Raises UserError if a run lacks the study's metric.
    """
    local_runs = _LocalRuns(study, launcher_dir, runs, record, processes)
    local_runs.run_all()
    if processes.stopped:
        logger.info(f"stopped by {processes.stopped.name}; run the same command to resume")
        return EXIT_CODE_STOPPED
    if failed := local_runs.failed:
        logger.warning(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")
    return 1 if failed else 0


class _LocalRuns:
    """The runs of a study on this machine, `parallel_runs` of them at a time."""

    def __init__(
        self, study: Study, launcher_dir: Path, runs: list[Run], record: StudyRecord, processes: ProcessRunner
    ):
        self._study, self._launcher_dir, self._runs = study, launcher_dir, runs
        self._record, self._processes = record, processes
        self._environments: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for environment in run_environments(study.config.parallel_runs):
            self._environments.put(environment)
        self._bookkeeping = threading.Lock()
        self.failed: list[str] = []
        """Names of the runs that failed."""

    def run_all(self) -> None:
        """Attempt all runs, in order. Raises UserError if a run lacks the study's metric, after stopping its peers."""
        with ThreadPoolExecutor(self._study.config.parallel_runs) as threads:
            attempts = [threads.submit(self._attempt, number, run) for number, run in enumerate(self._runs, 1)]
            for attempt in as_completed(attempts):
                attempt.result()

    def _attempt(self, number: int, run: Run) -> None:
        """Run the run unless it is done or the study was stopped."""
        environment = self._environments.get()
        try:
            if self._processes.stopped:
                return
            if not is_done(run):
                self._train_and_record(number, run, environment)
            if is_done(run):
                check_metric(self._study, run)
        except BaseException:
            if not self._processes.stopped:
                self._processes.stop(signal.SIGTERM)
            raise
        finally:
            self._environments.put(environment)

    def _train_and_record(self, number: int, run: Run, environment: Mapping[str, str]) -> None:
        log, title = log_path(self._study.folder, run.name), f"[{number}/{len(self._runs)}] {run.name}"
        logger.info(f"{title}{self._time_left()}; output in {log}")
        started = time.monotonic()
        problem = _train_and_evaluate(run, self._study, self._launcher_dir, log, self._processes, environment)
        seconds = time.monotonic() - started
        with self._bookkeeping:
            wall_seconds = self._record.wall_seconds
            wall_seconds[run.name] = round(wall_seconds.get(run.name, 0) + seconds, 1)
            self._record.save()
        if problem is None:
            logger.info(f"{title} done in {duration(seconds)}")
            save_records([run])
        elif not self._processes.stopped:
            self.failed.append(run.name)
            logger.warning(
                f"{title} FAILED: {problem}; see {log}. "
                "The other runs continue; run the same command later to try it again"
            )

    def _time_left(self) -> str:
        """Return a text with the estimated time left for all runs, based on the seconds per FLOP of finished runs.

        Returns "" if no finished run was timed.
        """
        with self._bookkeeping:
            seconds_per_flop = wall_seconds_per_flop(self._runs, self._record)
        if seconds_per_flop is None:
            return ""
        left = [run.flops for run in self._runs if not is_done(run)]
        seconds = sum(left) * seconds_per_flop / min(len(left), self._study.config.parallel_runs)
        return f", about {duration(seconds)} left for all runs"


def _train_and_evaluate(
    run: Run, study: Study, launcher_dir: Path, log: Path, processes: ProcessRunner, environment: Mapping[str, str]
) -> str | None:
    """Train and evaluate a run. Returns None if it is done, else the reason as message text."""
    if not is_trained(run):
        config = write_run_config(study.folder, run.config)
        code = processes.train(launcher_dir, study.config.launch, config, log, environment)
        if not is_trained(run):
            status = read_status(run.run_dir)
            return f"training ended with exit code {code}" + (f" ({status['reason']})" if status.get("reason") else "")
    if not processes.stopped and not is_done(run):
        rewrite_run_config(run)
        code = processes.evaluate(launcher_dir, run.run_dir, log, environment)
        if not is_done(run):
            return f"the evaluation ended with exit code {code}"
    return None


def wall_seconds_per_flop(runs: list[Run], record: StudyRecord) -> float | None:
    """Return the recorded wall-clock seconds of the finished runs per FLOP; None if no finished run was timed."""
    timed = [run for run in runs if run.name in record.wall_seconds and is_done(run)]
    if not timed:
        return None
    return sum(record.wall_seconds[run.name] for run in timed) / sum(run.flops for run in timed)
