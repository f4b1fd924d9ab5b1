"""Train each configuration in the same ranks and save logits of the trained engine in its run folder.

Usage: `logits_after_training.py CONFIG ...`.
"""

import sys

import torch

from pretrain.config import load_config
from pretrain.data.batch import assemble
from pretrain.data.loader import Loader
from pretrain.training.distributed import init_world
from pretrain.training.setup import set_up

for argument in sys.argv[1:]:
    if argument.startswith("--local_rank"):
        continue
    config, world = load_config(argument), init_world()
    trainer = set_up(config, world)
    assert trainer.train() == "finished"
    loader = trainer.loader
    rows = Loader(loader.corpus, loader.layout, loader.row_length, seed=99).next_rows(2)
    batch = assemble(rows, loader.corpus, loader.layout, trainer.specials, loader.row_length, 1000)
    trainer.engine.eval()
    with torch.no_grad():
        model = trainer.engine.module.model
        logits = model.logits(model(batch))[batch.label_index]
    if world.is_main:
        torch.save(
            {"token_ids": batch.token_ids.flatten(), "label_index": batch.label_index, "logits": logits},
            config.run_dir / "logits.pt",
        )
