"""Requests for background evaluations of a training run, and the launch of the evaluation job."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.utils.console import UserError
from pretrain.run_folder import PINS, list_steps, step_name
from pretrain.training.hooks import Hook

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

logger = logging.getLogger(__name__)

LOWEST_PRIORITY = '{ echo 19 > /proc/self/autogroup; } 2>/dev/null; exec nice -n 19 "$@"'
"""Shell command that runs its arguments with the lowest priority.

On Linux with autogroups, a niceness counts only among the processes of one session, and sessions have a niceness too.
Without the second one, an evaluation on the cores of two ranks halved their speed: whenever one rank loses its core for
a moment, the other one waits for it.
"""
SUPERVISED_VARIABLE = "JEPA_SUPERVISED"
"""Environment variable by which launcher/supervise.py recognises the processes of a run, which it ends with the run."""
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMPI_",
    "PMI_",
    "SLURM_",
    "TORCHELASTIC_",
    "GROUP_",
    "ROLE_",
    SUPERVISED_VARIABLE,
)
"""Environment variables that would mark an evaluation job as a process of the run; a name ending in `_` is a prefix."""


def single_process_environment() -> dict[str, str]:
    """Return this process's environment without the variables of launchers and of supervise.py."""
    return {
        name: value
        for name, value in os.environ.items()
        if not any(
            name == prefix or (prefix.endswith("_") and name.startswith(prefix)) for prefix in LAUNCHER_VARIABLES
        )
    }


def evaluation_environment(device: str) -> dict[str, str]:
    """Return the environment of a background evaluation on `device`: cpu, or cuda:N to make only that GPU visible."""
    kind, _, number = device.partition(":")
    return single_process_environment() | {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": number,
        "DS_ACCELERATOR": kind,
    }


def check_device(device: str) -> None:
    """Raise UserError if this machine does not have the device of background evaluations."""
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return
    all_devices = {
        name: value
        for name, value in single_process_environment().items()
        if name not in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    }
    code = "import torch; print(torch.cuda.device_count())"
    counted = subprocess.run([sys.executable, "-c", code], env=all_devices, check=True, capture_output=True, text=True)
    gpus = int(counted.stdout.split()[-1])
    if int(number) >= gpus:
        raise UserError(
            f"evaluation.device is {device}, but this machine has {gpus} GPUs: choose a GPU that training does not "
            "use, or cpu"
        )


def die_with_parent(command: list[str], signal_name: str) -> list[str]:
    """Return a command whose process receives a signal (TERM or KILL) when its parent dies for any reason."""
    return ["setpriv", "--pdeathsig", signal_name, *command]


def request_evaluation(run_dir: Path, step: int) -> None:
    """Request the evaluation of a checkpoint by pinning it: it is not removed until a job has evaluated it.

    Call this before the checkpoint is written, so a kill cannot lose the request.
    """
    pins = run_dir / "checkpoints" / PINS
    pins.mkdir(parents=True, exist_ok=True)
    (pins / step_name(step)).touch()


def requested_evaluations(run_dir: Path) -> list[int]:
    """Return the steps whose checkpoints exist and are pinned."""
    pins = run_dir / "checkpoints" / PINS
    return [step for step in list_steps(run_dir / "checkpoints") if (pins / step_name(step)).exists()]


def start_evaluations(run_dir: Path, device: str) -> None:
    """Start a background job on a device (cpu or cuda:N) that handles all requests. Jobs of a run wait for each other.

    The job is not a child of this rank, because launchers end a rank's children together with the rank.
    """
    arguments = ["-m", "pretrain.evaluation", str(run_dir), "--pending"]
    start_detached(arguments, run_dir / "evaluation", evaluation_environment(device))


def start_detached(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Start Python with the lowest priority as a process that survives this one.

    Its output is added to log.txt in `folder`. Raises OSError if the log cannot be written.
    """
    folder.mkdir(exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        subprocess.run(
            ["setsid", "--fork", "sh", "-c", LOWEST_PRIORITY, "sh", sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            check=False,
        )


class BackgroundEvaluations(Hook):
    """A hook that starts an evaluation in the background for some checkpoints (evaluation.every)."""

    def before_save(self, run: "Trainer") -> None:
        """Request the evaluation of a checkpoint, if one is due."""
        step = run.progress.step
        if run.world.is_main and _is_due(run, step):
            with _warn_on_os_error(step):
                request_evaluation(run.config.run_dir, step)

    def after_save(self, run: "Trainer", step: int) -> None:
        """Start the evaluation of a complete checkpoint, if one is due."""
        if run.world.is_main and _is_due(run, step):
            device = run.config.evaluation.device
            logger.info(
                f"evaluating step {step} in the background on {device}, log: "
                f"{run.config.run_dir / 'evaluation' / 'log.txt'}"
            )
            with _warn_on_os_error(step):
                start_evaluations(run.config.run_dir, device)


def _is_due(run: "Trainer", step: int) -> bool:
    return bool(run.config.evaluation.every) and step % run.config.evaluation.every == 0


@contextmanager
def _warn_on_os_error(step: int) -> Iterator[None]:
    """Turn an OSError, such as a full disk, into a warning instead of ending the run."""
    try:
        yield
    except OSError as error:
        logger.warning(f"skipping the evaluation of step {step}: {error.strerror or error}")
