"""Starting the evaluation job beside a training run."""

import os
import subprocess
import sys
from pathlib import Path

from data_prep.console import UserError
from pretrain.run_folder import PINS, list_steps, step_name

SUPERVISED_VARIABLE = "JEPA_SUPERVISED"
"""Environment variable by which launcher/supervise.py knows the processes of a run, which it ends with the run."""
OF_THE_LAUNCHER = (
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
"""Environment variables, or their beginnings, that would make the job, or others, believe it is a process of the run."""


def single_process_environment() -> dict[str, str]:
    """This process's environment without the variables of launchers and of supervise.py."""
    return {
        name: value
        for name, value in os.environ.items()
        if not any(name == prefix or (prefix.endswith("_") and name.startswith(prefix)) for prefix in OF_THE_LAUNCHER)
    }


def evaluation_environment(device: str) -> dict[str, str]:
    """Return the environment of a background evaluation, which sees one GPU, named as cuda:N, or none."""
    kind, _, number = device.partition(":")
    return single_process_environment() | {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": number,
        "DS_ACCELERATOR": kind,
    }


def check_device(device: str) -> None:
    """Raise UserError for a device of background evaluations that this machine does not have."""
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return
    everything = {
        name: value
        for name, value in single_process_environment().items()
        if name not in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    }
    code = "import torch; print(torch.cuda.device_count())"
    counted = subprocess.run([sys.executable, "-c", code], env=everything, check=True, capture_output=True, text=True)
    gpus = int(counted.stdout.split()[-1])
    if int(number) >= gpus:
        raise UserError(
            f"evaluation.device is {device}, but this machine has {gpus} GPUs: choose one that training leaves alone, or cpu"
        )


def die_with_parent(command: list[str], number: str) -> list[str]:
    """A command that gets a signal (TERM, KILL) when the process that starts it dies, however that comes."""
    return ["setpriv", "--pdeathsig", number, *command]


def request_evaluation(run_dir: Path, step: int) -> None:
    """Pin a checkpoint, before it stands: it is not removed until a job has evaluated it, so no kill loses the request."""
    pins = run_dir / "checkpoints" / PINS
    pins.mkdir(parents=True, exist_ok=True)
    (pins / step_name(step)).touch()


def requested_evaluations(run_dir: Path) -> list[int]:
    """Steps whose checkpoints stand and are pinned."""
    pins = run_dir / "checkpoints" / PINS
    return [step for step in list_steps(run_dir / "checkpoints") if (pins / step_name(step)).exists()]


def start_evaluations(run_dir: Path, device: str) -> None:
    """Start a background job on a device (cpu or cuda:N) that takes all requests; jobs of a run wait for each other.

    It is no child of this rank, because launchers end a rank's children with it.
    """
    evaluation = run_dir / "evaluation"
    evaluation.mkdir(exist_ok=True)
    with open(evaluation / "log.txt", "a") as log:
        subprocess.run(
            ["setsid", "--fork", "nice", sys.executable, "-m", "pretrain.evaluation", str(run_dir), "--pending"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=evaluation_environment(device),
            check=False,
        )
