"""Validation: both losses and the embedding monitors on the same unseen records every time."""

import deepspeed
import numpy as np
import torch

from pretrain.data.batch import assemble
from pretrain.data.corpus import Corpus
from pretrain.data.layout import Layout, Specials
from pretrain.data.loader import Rows, plan_rows
from pretrain.objectives.monitors import embedding_monitors
from pretrain.objectives.pool import Pool
from pretrain.training.distributed import World


class Validation:
    """The first records of the validation split, packed once and divided over the ranks.

    Micro steps are those of training, so a contrastive term has pools of the training's kind; the monitors look at all
    pairs together.
    """

    def __init__(self, corpus: Corpus, layout: Layout, specials: Specials, row_length: int, records: int, micro_batch_rows: int, world: World):
        numbers = np.arange(min(records, len(corpus)))
        rows = plan_rows(corpus, numbers, layout, row_length, np.ones(len(numbers), bool))
        per_micro_step = micro_batch_rows * world.size
        rows = Rows.join([rows], -(-rows.count // per_micro_step) * per_micro_step)
        self.world = world
        self.counts = {"lm": int(layout.lm_targets(rows.segment_lengths).sum()), "jepa": len(numbers)}
        pairs = rows.pairs_per_row().reshape(-1, world.size, micro_batch_rows).sum(axis=2).max(axis=1)
        self._batches = []
        for micro_step, padded in enumerate(pairs):
            first = (micro_step * world.size + world.rank) * micro_batch_rows
            mine = rows.select(first, first + micro_batch_rows)
            self._batches.append(assemble(mine, corpus, layout, specials, row_length, int(padded)))

    def run(self, engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
        """Validate on all ranks; the values by metric tag."""
        engine.eval()
        sums: dict[str, torch.Tensor] = {}
        pools = []
        with torch.no_grad():
            for batch in self._batches:
                output = engine(batch.to(self.world.device), with_pool=True)
                pools.append(output.pool)
                for name, value in output.terms.items():
                    sums[name] = sums.get(name, 0) + value
        engine.train()
        totals = self.world.sum(list(sums.values()))
        losses = {f"validation/loss/{name}": total / self.counts[name] for name, total in zip(sums, totals, strict=True)}
        monitors = embedding_monitors(Pool(
            prediction=torch.cat([pool.prediction for pool in pools]), target=torch.cat([pool.target for pool in pools]),
            key=torch.cat([pool.key for pool in pools]), valid=torch.cat([pool.valid for pool in pools]), own=slice(0, 0)))
        return losses | {f"validation/embedding/{name}": value for name, value in monitors.items()}
