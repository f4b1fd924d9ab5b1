"""Validation: all loss terms and the embedding monitors on held-out records, the same in every validation."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import deepspeed
import numpy as np
import torch

from data_prep.layout import Layout, SpecialTokenIds
from data_prep.utils.progress import Progress
from pretrain.data.batch import Batch, micro_batches
from pretrain.data.corpus import Corpus
from pretrain.data.loader import Rows, Unit, draw_random_bits, loss_denominators, plan_rows
from pretrain.objectives.monitors import embedding_monitors
from pretrain.objectives.pool import Pool
from pretrain.training.distributed import World
from pretrain.training.hooks import Hook, StepReport

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer


PROGRESS_DELAY = 10.0
"""Time after which a validation shows its progress, in seconds."""


class _Pass(NamedTuple):
    """The rows of one layout, and this rank's batches of them."""

    group: str
    layout: Layout
    rows: Rows
    batches: list[Batch]


class Validation:
    """Records spread evenly over the validation split, packed once and divided among the ranks.

    `layouts` has a layout for each group of embedding monitors; the loss is computed in the first one. Each source is
    represented in proportion to its size. Micro steps have the same rows as in training, so the pools of a contrastive
    term are comparable. The monitors of a group are computed over all of its pairs together.
    """

    def __init__(
        self,
        corpus: Corpus,
        layouts: Mapping[str, Layout],
        specials: SpecialTokenIds,
        row_length: int,
        records: int,
        micro_batch_rows: int,
        world: World,
    ):
        count = min(records, len(corpus))
        numbers = (2 * np.arange(count) + 1) * len(corpus) // (2 * count)
        random_bits = draw_random_bits(numbers, 0, np.zeros_like(numbers))
        per_micro_step = micro_batch_rows * world.size
        self.world = world
        self.passes: list[_Pass] = []
        for group, layout in layouts.items():
            rows = plan_rows(corpus, numbers, layout, row_length, np.ones(len(numbers), bool), random_bits)
            rows = Rows.join([rows], -(-rows.count // per_micro_step) * per_micro_step)
            batches = micro_batches(
                rows,
                corpus,
                layout,
                specials,
                row_length,
                micro_batch_rows=micro_batch_rows,
                rank=world.rank,
                ranks=world.size,
            )
            self.passes.append(_Pass(group, layout, rows, list(batches)))

    def run(
        self, engine: deepspeed.DeepSpeedEngine, units: Mapping[str, Unit], stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Validate on all ranks; return the values by metric tag. Only the main rank returns the embedding monitors.

        `units` maps each term of the objective to its unit. `stop` is called before each batch and must return the same
        value on all ranks; if it returns True, the validation ends and returns None.
        """
        engine.eval()
        sums: dict[str, torch.Tensor] = {}
        monitors: dict[str, float] = {}
        batches = sum(len(one.batches) for one in self.passes)
        with torch.no_grad(), Progress("validation", batches, "batches", PROGRESS_DELAY) as progress:
            for number, one in enumerate(self.passes):
                pools = []
                for batch in one.batches:
                    if stop():
                        engine.train()
                        return None
                    output = engine(batch.to(self.world.device), with_pool=True)
                    pools.append(output.pool)
                    progress.update(1)
                    if number == 0:
                        for name, value in output.terms.items():
                            sums[name] = sums.get(name, 0) + value
                if self.world.is_main:
                    values = embedding_monitors(Pool.join(pools))
                    monitors |= {f"validation/{one.group}/{name}": value for name, value in values.items()}
        engine.train()
        totals = self.world.sum(list(sums.values()))
        counts = self.counts(units)
        losses = {
            f"validation/loss/{name}": total / counts[name]
            for name, total in zip(sums, totals, strict=True)
            if counts[name]  # without pairs, a loss of 0 would look perfect
        }
        return losses | monitors

    def counts(self, units: Mapping[str, Unit]) -> dict[str, int]:
        """Return the count that normalises each loss term."""
        first = self.passes[0]
        return loss_denominators(first.rows, first.layout, units)


class PeriodicValidation(Hook):
    """A hook that validates after some steps (monitor.validate_every) and after the last one."""

    def after_step(self, run: "Trainer", report: StepReport) -> None:
        """Validate if a validation is due, and add its values to the report.

        If a signal interrupts the validation, the run keeps the values of the step unlogged until the next launch has
        repeated the validation.
        """
        if run.validation is None or not (
            run.at_end or report.repeated or run.is_due(run.config.monitor.validate_every)
        ):
            return
        values = run.validation.run(run.engine, run.objective.units, run.stop_requested)
        if values is None:
            run.unlogged, report.values = report.values, {}
        else:
            run.call_hooks(lambda hook: hook.after_validation(run, values))
            report.values = report.values | values
