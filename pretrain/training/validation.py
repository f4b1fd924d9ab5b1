"""Validation: both losses and the embedding monitors on the same unseen records every time."""

from collections.abc import Callable, Mapping

import deepspeed
import numpy as np
import torch

from pretrain.data.batch import micro_batches
from pretrain.data.corpus import Corpus
from pretrain.data.layout import Layout, SpecialTokenIds
from pretrain.data.loader import Rows, draw_random_bits, loss_denominators, plan_rows
from pretrain.objectives.monitors import embedding_monitors
from pretrain.objectives.pool import Pool
from pretrain.training.distributed import World


class Validation:
    """Records spread evenly over the validation split, so that each source has its share, packed once and divided over the ranks.

    Micro steps are those of training, so a contrastive term has pools of the training's kind; the monitors look at all
    pairs together.
    """

    def __init__(
        self,
        corpus: Corpus,
        layout: Layout,
        specials: SpecialTokenIds,
        row_length: int,
        records: int,
        micro_batch_rows: int,
        world: World,
    ):
        count = min(records, len(corpus))
        numbers = (2 * np.arange(count) + 1) * len(corpus) // (2 * count)
        rows = plan_rows(
            corpus,
            numbers,
            layout,
            row_length,
            np.ones(len(numbers), bool),
            draw_random_bits(numbers, 0, np.zeros_like(numbers)),
        )
        per_micro_step = micro_batch_rows * world.size
        rows = Rows.join([rows], -(-rows.count // per_micro_step) * per_micro_step)
        self.world = world
        self.loss_denominators = loss_denominators(rows, layout)
        self.batches = list(
            micro_batches(
                rows,
                corpus,
                layout,
                specials,
                row_length,
                micro_batch_rows=micro_batch_rows,
                rank=world.rank,
                ranks=world.size,
            )
        )

    def run(
        self, engine: deepspeed.DeepSpeedEngine, units: Mapping[str, str], stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Validate on all ranks; return the values by metric tag, those of the embeddings on the main rank alone.

        `units` says what each term of the objective is divided by.

        None where `stop`, which is asked before each batch and gives all ranks the same answer, says so.
        """
        engine.eval()
        sums: dict[str, torch.Tensor] = {}
        pools = []
        with torch.no_grad():
            for batch in self.batches:
                if stop():
                    engine.train()
                    return None
                output = engine(batch.to(self.world.device), with_pool=True)
                pools.append(output.pool)
                for name, value in output.terms.items():
                    sums[name] = sums.get(name, 0) + value
        engine.train()
        totals = self.world.sum(list(sums.values()))
        losses = {
            f"validation/loss/{name}": total / count
            for name, total in zip(sums, totals, strict=True)
            if (count := self.loss_denominators[units[name]])
        }  # without a pair there is no loss of pairs, rather than a perfect one
        monitors = embedding_monitors(Pool.join(pools)) if self.world.is_main else {}
        return losses | {f"validation/embedding/{name}": value for name, value in monitors.items()}
