"""`make demo`: the main job end to end on two local processes. Arguments are overrides of configs/demo.yaml."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from data_prep.console import exit_on_user_error
from pretrain.config import load_config

CONFIG = "configs/demo.yaml"
RANKS = 2


def _free_port() -> int:
    """A port for the rendezvous, so that two jobs on a machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    os.chdir(Path(__file__).parent.parent)
    overrides = sys.argv[1:]
    run_dir = load_config(CONFIG, overrides).run_dir
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    steps = {
        "preparing the corpus": [sys.executable, "-m", "data_prep", CONFIG, *overrides],
        f"pretraining on {RANKS} processes": [deepspeed, "--num_gpus", str(RANKS), "--master_port", str(_free_port()), "--log_level", "warning",
                                                "launcher/run.py", CONFIG, *overrides],
        "evaluating the last checkpoint": [sys.executable, "launcher/evaluate.py", str(run_dir)],
    }
    started = time.perf_counter()
    for number, (what, command) in enumerate(steps.items(), 1):
        print(f"\n[{number}/{len(steps)}] {what} ({time.perf_counter() - started:.0f}s so far)\n$ {' '.join(command)}", flush=True)
        done = subprocess.run(command, check=False)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    exit_on_user_error(main)
