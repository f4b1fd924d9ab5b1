"""Cost of the JEPA term: throughput and memory of the project's forward pass and of the published methods.

    python benchmarks/objective_cost.py [--rounds 6] [--ranks 2] > cost.json

Every arm takes the same records in each optimizer step, with the same engine (ZeRO-3), optimizer and model. On CPU
the model is configs/models/llama_2m.yaml in fp32. On CUDA it is a Llama of 1B parameters in bf16, if
configs/models/llama_1b.yaml exists. The learning rate is 0, so each step starts from the same weights. In every
round, all arms are timed and compared: a temporary slowdown of the machine then affects all arms.
One JSON object is written to stdout, progress to stderr.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from cost_arms import ARMS, PREDICTOR_TOKENS

from data_prep.pipeline import prepare
from data_prep.utils.console import show_messages
from pretrain.config import load_config

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "configs" / "models"
CORPUS_RECORDS = 4096
SEED = 1


def main() -> None:
    """Parse the command line, measure the arms and print the result."""
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    large = MODELS / "llama_1b.yaml"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() if on_gpu else 2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--steps", type=int, default=4, help="timed steps of the baseline per round; slower arms run fewer"
    )
    parser.add_argument(
        "--records", type=int, default=2048 if on_gpu else 640, help="records of an optimizer step, over all ranks"
    )
    parser.add_argument("--row-length", type=int, default=4096 if on_gpu else 128, help="positions of a packed row")
    parser.add_argument(
        "--micro-slots",
        type=int,
        default=16384,
        help="maximum number of positions, with padding, of a rank in a micro step, summed over all passes",
    )
    parser.add_argument("--model", type=Path, default=large if on_gpu and large.exists() else MODELS / "llama_2m.yaml")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=ARMS,
        choices=ARMS,
        metavar="NAME",
        help=f"some of: {', '.join(ARMS)}; the first arm is always included",
    )
    parser.add_argument(
        "--folder", type=Path, help=argparse.SUPPRESS
    )  # of the prepared corpus; it makes this process a rank
    arguments = parser.parse_args()
    if arguments.records % arguments.ranks:
        parser.error("--records must be a multiple of --ranks")
    if arguments.folder:
        from cost_report import run_rank  # imports DeepSpeed, which prints warnings about the machine to stdout

        run_rank(arguments)
    else:
        start_ranks(arguments, on_gpu)


def start_ranks(arguments: argparse.Namespace, on_gpu: bool) -> None:
    """Prepare the corpus, start this file once per rank, and print the result of rank 0."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(yaml.safe_dump(run_values(arguments, folder, on_gpu)))
        show_messages("stderr")
        prepare(load_config(folder / "config.yaml").data)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        command = [
            Path(sys.executable).parent / "deepspeed",
            "--num_gpus",
            arguments.ranks,
            "--master_port",
            port,
            "--no_local_rank",
            "--log_level",
            "warning",
            __file__,
            "--folder",
            folder,
        ]
        for option in ("rounds", "steps", "records", "row_length", "micro_slots", "model"):
            command += ["--" + option.replace("_", "-"), getattr(arguments, option)]
        command += ["--arms", *arguments.arms]
        environment = os.environ | ({} if on_gpu else {"DS_ACCELERATOR": "cpu"})
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, stdout=sys.stderr)
        if done.returncode:
            sys.exit(done.returncode)
        print((folder / "result.json").read_text())


def run_values(arguments: argparse.Namespace, folder: Path, on_gpu: bool) -> dict[str, Any]:
    """Return the configuration of a run with the sections that the benchmark uses."""
    return {
        "name": "cost",
        "seed": SEED,
        "output_dir": str(folder),
        "data": {
            "path": str(folder / "corpus"),
            "sequence_length": arguments.row_length,
            "tokenizer": {"vocab_size": 512},
            "workers": 1,
            "deduplicate": "none",
            "sources": [{"type": "nlrx", "records": max(CORPUS_RECORDS, arguments.records)}],
        },
        "model": {"family": "llama", "shape": yaml.safe_load(arguments.model.read_text())},
        "objective": {"name": "llm_jepa", "predictor_tokens": PREDICTOR_TOKENS, "distance": "cosine"},
        "train": {
            "steps": 1,
            "learning_rate": 1e-3,
            "precision": "bf16" if on_gpu else "fp32",
            "global_batch_rows": arguments.ranks,
            "micro_batch_rows": 1,
        },
    }


if __name__ == "__main__":
    main()
