"""Host time of ZeRO's hooks, measured in passes through a model that itself needs almost no time.

    python benchmarks/host_time.py [--rounds 15]

A model of 16 layers of width 32 is trained in one process and one CPU thread, even if there is a GPU. The settings
are ZeRO stage 1, and stage 3 in three ways: with hooks around every module, with hooks around whole layers, and with
hooks around every module but no parameter partitioned. A stage 3 run has hooks around whole layers unless it sets
monitor.gradients_every. In every round, each setting is measured once. The table shows the processor time (median over
the rounds) and its ratio to the baseline of the same round (median, minimum and maximum over the rounds).
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

from data_prep.utils.console import exit_on_user_error
from pretrain.config import load_config
from pretrain.data.batch import Batch
from pretrain.training.distributed import World, init_world
from pretrain.training.loop import Trainer
from pretrain.training.setup import set_up

NEVER = 10**9
EVERYTHING = 10**9
"""A size that no parameter reaches."""
SETTINGS: dict[str, dict[str, Any]] = {
    "stage 1": {"deepspeed": {"zero_optimization": {"stage": 1}}},
    "stage 3, every module": {"deepspeed": {"zero_optimization": {"stage": 3}}, "monitor": {"gradients_every": NEVER}},
    "stage 3, whole layers": {"deepspeed": {"zero_optimization": {"stage": 3}}},
    "stage 3, every module, nothing partitioned": {
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": EVERYTHING}},
        "monitor": {"gradients_every": NEVER},
    },
}
BASELINE = "stage 3, every module"


def main() -> None:
    """Measure all settings and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each setting (default: 15)")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be positive")
    warnings.filterwarnings("ignore", category=FutureWarning)  # from functions that DeepSpeed calls
    world = init_world()
    with tempfile.TemporaryDirectory() as temporary:
        trainers = {
            setting: build(Path(temporary), number, changes, world)
            for number, (setting, changes) in enumerate(SETTINGS.items())
        }
        validation = trainers[BASELINE].validation
        assert validation is not None
        batch = validation.passes[0].batches[0]
        for trainer in trainers.values():
            pass_seconds(trainer, batch)  # DeepSpeed records the order of the modules in the first passes
            pass_seconds(trainer, batch)
        seconds: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
        for number in range(arguments.rounds):
            for setting, trainer in trainers.items():
                seconds[setting].append(pass_seconds(trainer, batch))
            print(f"round {number + 1} of {arguments.rounds}", end="\r", flush=True)
    print(f"{'':40}{'milliseconds':>14}{'relative to ' + BASELINE:>37}")
    for setting, setting_seconds in seconds.items():
        ratios = [value / baseline for value, baseline in zip(setting_seconds, seconds[BASELINE], strict=True)]
        print(
            f"{setting:40}{1e3 * statistics.median(setting_seconds):14.1f}{statistics.median(ratios):22.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def build(folder: Path, number: int, changes: dict, world: World) -> Trainer:
    """Return the trainer of a setting."""
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
    """Return the processor seconds of a forward and a backward pass, without the optimizer step."""
    started = time.process_time()
    output = trainer.engine(batch)
    trainer.engine.backward(sum(output.terms.values()), scale_wrt_gas=False)
    seconds = time.process_time() - started
    trainer.engine.step()
    return seconds


if __name__ == "__main__":
    exit_on_user_error(main)
