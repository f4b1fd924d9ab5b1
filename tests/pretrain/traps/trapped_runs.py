"""Train several runs in the same ranks, some with a deliberate bug: `trapped_runs.py [CHANGE+...:]CONFIG ...`.

A trap is a mistake that is common in training code; its number is the one of the test `test_trap_NN_...`.

The file NAME.rankR.json next to the configuration records how the run ended and how many texts it tokenized. A second
start of a run overwrites it.
"""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed import DeepSpeedEngine

from data_prep.tokenizer import Tokenizer
from data_prep.utils.console import show_messages
from pretrain.config import load_config
from pretrain.data.corpus import Corpus
from pretrain.objectives import llm_jepa
from pretrain.training import distributed, engine, loop, setup, validation
from pretrain.training.main import run

RANK = int(os.environ.get("SLURM_PROCID", 0))
DROPOUT = 0.3
STOP_AT = 2


def stopped(patch: pytest.MonkeyPatch) -> None:
    """Stop the run with a signal in its second step. This is not a trap."""
    original = loop.Trainer._count

    def count(self, rows):
        original(self, rows)
        if self.progress.step == STOP_AT:
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(loop.Trainer, "_count", count)


def pairs_of_a_micro_batch(patch: pytest.MonkeyPatch) -> None:
    """Reintroduce trap 4: normalise the pair loss over a micro batch, a quarter of the step."""
    original = loop.total_loss
    patch.setattr(
        loop,
        "total_loss",
        lambda terms, counts, weights, ranks: original(terms, counts | {"jepa": counts["jepa"] / 4}, weights, ranks),
    )


def no_master_weights(patch: pytest.MonkeyPatch) -> None:
    """Reintroduce trap 5: train in bf16 without fp32 master weights."""
    original = engine.engine_settings
    bf16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    patch.setattr(engine, "engine_settings", lambda config, ranks: original(config, ranks) | {"bf16": bf16})


def losses_alone(patch: pytest.MonkeyPatch) -> None:
    """Reintroduce trap 11: measure nothing but losses."""
    for module in (loop, validation):
        patch.setattr(module, "embedding_monitors", lambda pool: {})


def dropout_in_the_loss(patch: pytest.MonkeyPatch) -> None:
    """Reintroduce trap 14: draw the dropped pairs separately on every rank, after packing."""
    original, generator = loop.micro_batches, torch.Generator().manual_seed(RANK)

    def micro_batches(*arguments, **options):
        for batch in original(*arguments, **options):
            yield replace(
                batch, pair_valid=batch.pair_valid & (torch.rand(len(batch.pair_valid), generator=generator) >= DROPOUT)
            )

    patch.setattr(loop, "micro_batches", micro_batches)
    patch.setattr(llm_jepa.Config, "loss_dropout", lambda self, fraction: 0.0)


def deleted_at_start(patch: pytest.MonkeyPatch) -> None:
    """Reintroduce trap 15: delete the run folder at startup."""
    original = setup.set_up

    def set_up(config, *arguments):
        shutil.rmtree(config.run_dir, ignore_errors=True)
        return original(config, *arguments)

    patch.setattr(setup, "set_up", set_up)


def device_0_is_rank_0(patch: pytest.MonkeyPatch) -> None:
    """Reintroduce trap 16: let one process per node write."""
    patch.setattr(distributed.World, "is_main", property(lambda self: os.environ["LOCAL_RANK"] == "0"))


def saved_by_rank_0(patch: pytest.MonkeyPatch) -> None:
    """Reintroduce trap 16: save the optimizer shard of rank 0 only."""
    if RANK:
        patch.setattr(DeepSpeedEngine, "_save_zero_checkpoint", lambda self, *arguments, **options: None)


def launcher_needed(patch: pytest.MonkeyPatch) -> None:
    """Reintroduce trap 17: require the environment variables of a launcher."""
    patch.setattr(
        distributed,
        "init_world",
        lambda: distributed.World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.device("cpu")),
    )


def tokenized_at_start(patch: pytest.MonkeyPatch) -> None:
    """Reintroduce trap 24: tokenize all texts of the corpus at startup."""

    class RetokenizedCorpus(Corpus):
        def __init__(self, folder, split):
            super().__init__(folder, split)
            self.tokenizer.encode_batch(
                [self.tokenizer.decode(self.tokens(np.array([record]), 0)) for record in range(len(self))]
            )

    patch.setattr(setup, "Corpus", RetokenizedCorpus)


def tokenized_texts(patch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects all texts that are tokenized after this call."""
    original, seen = Tokenizer.encode_ragged, []

    def encode_ragged(self, texts):
        seen.extend(texts)
        return original(self, texts)

    patch.setattr(Tokenizer, "encode_ragged", encode_ragged)
    return seen


def main() -> None:
    show_messages()
    for argument in sys.argv[1:]:
        changes, _, path = argument.rpartition(":")
        with pytest.MonkeyPatch.context() as patch:
            for change in filter(None, changes.split("+")):
                globals()[change](patch)
            texts, ended = tokenized_texts(patch), "finished"
            try:
                run(load_config(path))
            except SystemExit as end:
                ended = f"exit code {end.code}"
            except Exception as error:
                ended = repr(error)
        Path(path).with_suffix(f".rank{RANK}.json").write_text(json.dumps({"ended": ended, "tokenized": len(texts)}))


if __name__ == "__main__":
    main()
