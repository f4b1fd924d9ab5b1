"""The main job end to end on two local processes, or on the nodes of a hostfile: `make demo`.

Arguments other than `--hostfile` are overrides of configs/demo.yaml.
"""

import argparse
import logging
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

from data_prep.nlrx_grammar import generate
from data_prep.utils.console import UserError, exit_on_user_error
from pretrain.config import load_config

logger = logging.getLogger("launcher.demo")

CONFIG = "configs/demo.yaml"
RANKS = 2
UNSEEN = 500
"""Number of unseen pairs among which the demo searches."""
TRIED = 3
"""Number of unseen descriptions for which the demo writes an expression."""


def _free_port() -> int:
    """Return a free port for the rendezvous, to let two jobs on a machine use different ports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """Run the demo: prepare the corpus, train, evaluate, and print the table of results."""
    os.chdir(Path(__file__).parent.parent)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--hostfile",
        help="nodes to train on, started through pdsh; all must share this folder and its runs folder",
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=f"overrides of {CONFIG}")
    arguments = parser.parse_args()
    overrides = arguments.overrides
    nodes = ["--num_gpus", str(RANKS)]
    if arguments.hostfile:
        if not Path(arguments.hostfile).is_file():
            raise UserError(f"--hostfile: there is no file {arguments.hostfile}: correct the path")
        nodes = ["--hostfile", arguments.hostfile, "--launcher", "pdsh"]
    config = load_config(CONFIG, overrides)
    run_dir = config.run_dir
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    steps = {
        "preparing the corpus": [sys.executable, "-m", "data_prep", CONFIG, *overrides],
        f"pretraining on {arguments.hostfile or f'{RANKS} processes'}": [
            deepspeed,
            *nodes,
            "--master_port",
            str(_free_port()),
            "--log_level",
            "error",
            "launcher/run.py",
            CONFIG,
            *overrides,
        ],
        "evaluating the last checkpoint": [sys.executable, "launcher/evaluate.py", str(run_dir)],
    }
    if config.data.views == ("text", "code"):
        steps |= _trial(run_dir)
    started = time.perf_counter()
    for number, (title, command) in enumerate(steps.items(), 1):
        logger.info(
            f"\n[{number}/{len(steps)}] {title} ({time.perf_counter() - started:.0f}s so far)\n$ {shlex.join(command)}"
        )
        result = subprocess.run(command, check=False)
        if result.returncode:
            sys.exit(result.returncode)


def _trial(run_dir: Path) -> dict[str, list[str]]:
    """Return the commands that try the model: expressions for unseen descriptions, and the closest ones of a file."""
    from data_prep.task_rows import write_views  # imported late because it loads pyarrow

    pairs = [generate(0, "test", number) for number in range(UNSEEN)]
    file = run_dir.parent / f"{run_dir.name}-unseen.jsonl"
    write_views(file, ("text", "code"), pairs)
    descriptions = [text for text, _ in pairs[:TRIED]]
    return {
        "writing the expressions of unseen descriptions": [
            *(sys.executable, "launcher/generate.py", str(run_dir)),
            *descriptions,
        ],
        "searching the closest expressions among unseen ones": [
            *(sys.executable, "launcher/search.py", str(run_dir), "--index", str(file), "--top", "3"),
            *descriptions,
        ],
    }


if __name__ == "__main__":
    exit_on_user_error(main)
