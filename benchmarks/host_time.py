"""Host time of ZeRO's hooks: what a forward and a backward pass cost when the model itself costs almost nothing.

    python benchmarks/host_time.py [--rounds 15]

A model of 16 layers 32 wide is trained on one process and one thread of a CPU, also where there is a GPU, under ZeRO stage 1, under stage 3 with
hooks around every module, and under stage 3 with hooks around whole layers, which is what a run has unless it sets monitor.gradients_every. The ways
take turns within a round, and the figures are processor seconds: medians over the rounds, and ratios of the same round.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import yaml

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

from data_prep.console import exit_on_user_error
from pretrain.config import load_config
from pretrain.data.batch import Batch
from pretrain.training.distributed import World, init_world
from pretrain.training.loop import Trainer
from pretrain.training.setup import set_up

NEVER = 10**9
WAYS: dict[str, dict[str, Any]] = {
    "stage 1": {"deepspeed": {"zero_optimization": {"stage": 1}}},
    "stage 3, every module": {"deepspeed": {"zero_optimization": {"stage": 3}}, "monitor": {"gradients_every": NEVER}},
    "stage 3, whole layers": {"deepspeed": {"zero_optimization": {"stage": 3}}},
    "stage 3, every module, nothing partitioned": {
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": NEVER}},
        "monitor": {"gradients_every": NEVER},
    },
}
BASELINE = "stage 3, every module"


def main() -> None:
    """Measure all ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="times that each way is measured (default: 15)")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be positive")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of what DeepSpeed calls
    world = init_world()
    with tempfile.TemporaryDirectory() as temporary:
        trainers = {
            way: build(Path(temporary), number, changes, world) for number, (way, changes) in enumerate(WAYS.items())
        }
        validation = trainers[BASELINE].validation
        assert validation is not None
        batch = validation.batches[0]
        for trainer in trainers.values():
            pass_seconds(trainer, batch)  # DeepSpeed records the order of the modules
            pass_seconds(trainer, batch)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(arguments.rounds):
            for way, trainer in trainers.items():
                seconds[way].append(pass_seconds(trainer, batch))
            print(f"round {number + 1} of {arguments.rounds}", end="\r", flush=True)
    print(f"{'':40}{'milliseconds':>14}{'of ' + BASELINE:>30}")
    for way, each in seconds.items():
        ratios = [one / other for one, other in zip(each, seconds[BASELINE], strict=True)]
        print(
            f"{way:40}{1e3 * statistics.median(each):14.1f}{statistics.median(ratios):22.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def build(folder: Path, number: int, changes: dict, world: World) -> Trainer:
    """Return a run of a way, ready to train."""
    config = {
        "name": f"way-{number}",
        "output_dir": str(folder / "runs"),
        "data": {
            "path": str(folder / "corpus"),
            "sequence_length": 128,
            "tokenizer": {"vocab_size": 400},
            "workers": 1,
            "deduplicate": "none",
            "sources": [{"type": "nlrx", "split": split, "records": 300} for split in ("train", "validation")],
        },
        "model": {
            "family": "llama",
            "shape": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
            },
        },
        "objective": {"name": "llm_jepa"},
        "train": {"steps": 10, "global_batch_rows": 1, "micro_batch_rows": 1, "learning_rate": 1e-3},
    } | changes
    path = folder / f"{number}.yaml"
    path.write_text(yaml.safe_dump(config))
    if not (folder / "corpus").exists():
        subprocess.run([sys.executable, "-m", "data_prep", str(path)], check=True, stdout=subprocess.DEVNULL)
    trainer = set_up(load_config(path), world)
    assert trainer is not None
    return trainer


def pass_seconds(trainer: Trainer, batch: Batch) -> float:
    """Return the processor seconds of a forward and a backward pass; the optimizer's step after them is not counted."""
    started = time.process_time()
    output = trainer.engine(batch)
    trainer.engine.backward(sum(output.terms.values()), scale_wrt_gas=False)
    seconds = time.process_time() - started
    trainer.engine.step()
    return seconds


if __name__ == "__main__":
    exit_on_user_error(main)
