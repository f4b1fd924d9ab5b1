"""Starting the evaluation job beside a training run."""

import os
import subprocess
import sys
from pathlib import Path

from pretrain.run_folder import PINS, step_name

OF_THE_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT",
                   "OMPI_", "PMI_", "SLURM_", "TORCHELASTIC_", "GROUP_", "ROLE_")
"""Environment variables, or their beginnings, that would make the job believe it is a rank of the run."""


def single_process_environment() -> dict[str, str]:
    """This process's environment without the launcher's variables."""
    return {name: value for name, value in os.environ.items() if not any(
        name == prefix or (prefix.endswith("_") and name.startswith(prefix)) for prefix in OF_THE_LAUNCHER)}


def start_evaluation(run_dir: Path, step: int) -> None:
    """Ask for the evaluation of a checkpoint and start the job in the background.

    The pin keeps the checkpoint from being removed, and is the request: whichever job runs next takes it, so nothing is lost when a
    job dies. The job is no child of this rank, because launchers end a rank's children with it; jobs run one at a time.
    """
    pins = run_dir / "checkpoints" / PINS
    pins.mkdir(exist_ok=True)
    (pins / step_name(step)).touch()
    evaluation = run_dir / "evaluation"
    evaluation.mkdir(exist_ok=True)
    print(f"evaluating step {step} in the background, log in {evaluation / 'log.txt'}", flush=True)
    with open(evaluation / "log.txt", "a") as log:
        subprocess.run(["setsid", "--fork", "nice", sys.executable, "-m", "pretrain.evaluation", str(run_dir), "--pending"],
                       stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=single_process_environment(), check=False)
