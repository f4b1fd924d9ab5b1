"""The training loop."""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import deepspeed
import torch

from data_prep.layout import SpecialTokenIds
from data_prep.utils.console import UserError
from pretrain.config import RunConfig
from pretrain.data.batch import Batch, micro_batches
from pretrain.data.loader import Consumed, Loader, Rows, count_pairs
from pretrain.data.prefetch import Prefetch, StepData
from pretrain.objectives.base import Z_LOSS, Objective, total_loss
from pretrain.objectives.monitors import embedding_monitors
from pretrain.objectives.pool import Pool
from pretrain.planning.budget import Progress, budget_use, consumed_fraction
from pretrain.run_folder import REWIND_REASON_PREFIX, list_steps, write_status
from pretrain.training.clipped_steps import ClippedSteps
from pretrain.training.collapse import CollapseWarning
from pretrain.training.distributed import World
from pretrain.training.evaluation_requests import BackgroundEvaluations
from pretrain.training.gradients import gradient_diagnostics
from pretrain.training.hooks import Ending, Hook, StepReport, StopTraining
from pretrain.training.hub_pushes import BackgroundPushes
from pretrain.training.loggers import build_loggers
from pretrain.training.profile import Profile
from pretrain.training.progress_line import ProgressLines
from pretrain.training.rank_store import LocalRankStore
from pretrain.training.saving import Saver
from pretrain.training.schedule import is_before_decay, is_decaying, learning_rate
from pretrain.training.spikes import SpikeGuard
from pretrain.training.stop import LauncherGraceNote, StopRequest
from pretrain.training.throughput import Throughput
from pretrain.training.validation import PeriodicValidation, Validation
from pretrain.training.watchdog import Watchdog
from pretrain.training.weight_sums import weight_sums

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepConsensus:
    """The results of a step that are the same on all ranks, from its only synchronisation."""

    losses: dict[str, float]
    """Mean of each term over the global batch. A term is absent if the batch has nothing to average, such as pairs."""
    stopping: bool
    """Whether any rank has received a signal to stop."""
    data_failed: bool
    """Whether any rank failed to load data for the next step."""
    saving: bool
    """Whether any rank is still writing a checkpoint."""


@dataclass
class Trainer:
    """The components and the state of a training run.

    The loop trains, counts and saves. Everything else that happens during a run is a hook; see
    pretrain/training/hooks.py.
    """

    config: RunConfig
    world: World
    engine: deepspeed.DeepSpeedEngine
    loader: Loader
    specials: SpecialTokenIds
    objective: Objective
    throughput: Throughput
    validation: Validation | None
    progress: Progress = field(default_factory=Progress)
    stop: StopRequest = field(default_factory=StopRequest)
    unlogged: dict[str, float] | None = None
    """Values of the last step if a signal interrupted its validation; the next launch repeats that validation."""
    reason: str = ""
    """Reason why the run stopped before its end."""
    step_seconds: float = 0.0
    """Duration of the last step."""
    print_fatal: Callable[[str], None] = field(default=partial(print, file=sys.stderr, flush=True))
    """Function that prints to the console, on any rank, why this process ends."""

    def __post_init__(self) -> None:
        self._consumed_before = Consumed()
        self.saver = Saver(
            self.engine,
            self.config.run_dir / "checkpoints",
            self.config.checkpoint,
            self.world,
            self._on_saved,
            partial(is_before_decay, self.config.train, self.loader.records)
            if self.config.train.schedule == "warmup_stable_decay"
            else None,
        )
        self.watchdog = Watchdog(
            self.world.rank_store or LocalRankStore(),
            self.world.rank,
            self.world.hosts,
            self.config.monitor.hang_seconds,
            self._report_hang,
        )
        if self.world.rank_store is not None:  # from here on the peers wait for this rank
            self.watchdog.begin()
        self.spikes = SpikeGuard(self.config.run_dir, self.pool_rows)
        self.hooks: list[Hook] = [
            self.watchdog,
            self.spikes,
            ClippedSteps(),
            BackgroundEvaluations(),
            *([BackgroundPushes(self.config.hub)] if self.config.hub and self.world.is_main else []),
            LauncherGraceNote(),
            ProgressLines(),
            CollapseWarning(),
            PeriodicValidation(),
            *([Profile(self.config.monitor.profile)] if self.config.monitor.profile else []),
            *(build_loggers(self.config) if self.world.is_main else []),
        ]

    def train(self) -> str:
        """Train until the budget is used up or a signal arrives; return the final status.

        Raises UserError, on all ranks, if a shard is corrupt or the last checkpoint cannot be written.
        """
        ending: Ending = "crashed"
        started: list[Hook] = []
        try:

            def start(hook: Hook) -> None:
                hook.start(self)
                started.append(hook)

            self.call_hooks(start)
            with Prefetch(
                self.loader,
                self.config.train.global_batch_rows,
                self._micro_batches,
                self.objective.units,
                self.world.device,
            ) as data:
                status = self._train(data)
            self.finish_save()
            ending = status
        except UserError:  # all ranks raise it together
            self.finish_save()
            ending = "failed"
            raise
        finally:
            try:
                self.saver.close()
            finally:
                self._end_hooks(started, ending)
        if self.saver.problem and not self.reason.startswith(REWIND_REASON_PREFIX):
            steps = list_steps(self.config.run_dir / "checkpoints")
            raise UserError(
                f"the last checkpoint was not written: {self.saver.problem}; once this is fixed, run the same command "
                + (f"again to resume from step {steps[-1]}" if steps else "again to start from the beginning")
            )
        return status

    def _end_hooks(self, started: list[Hook], ending: Ending) -> None:
        """Call `end` of all started hooks. An error is a warning, because the run itself is over."""
        for hook in started:
            try:
                hook.end(self, ending)
            except Exception as error:
                logger.warning(f"{type(hook).__module__} failed at the end of the run: {type(error).__name__}: {error}")

    def call_hooks(self, call: Callable[[Hook], None]) -> None:
        """Call all hooks in order.

        All ranks raise a UserError together, but a logger exists on one rank only. With several ranks, a UserError of a
        hook is therefore raised as a RuntimeError, which also ends its peers.
        """
        for hook in self.hooks:
            try:
                call(hook)
            except UserError as error:
                if self.world.size == 1:
                    raise
                raise RuntimeError(f"{type(hook).__module__}: {error}") from error

    def _train(self, data: Prefetch) -> Literal["finished", "resumable"]:
        stopping = self.stop_requested()
        data_failed = True  # the first step must check for data errors on all ranks
        try:
            if self.unlogged is not None and not stopping:
                values, self.unlogged = self.unlogged, None
                stopping = not self._finish_step(StepReport(values, repeated=True))
            while not self.at_end and not stopping:
                step = self.world.run_and_sync_errors(data.next) if data_failed else data.next()
                report, consensus = self._train_step(step, data)
                data_failed = consensus.data_failed
                stopping = not self._finish_step(report) or consensus.stopping
                if (
                    self.at_end
                    or stopping
                    or data_failed
                    or self.is_due(self.config.checkpoint.every)
                    or self._decay_begins()
                ):
                    self._save(step.state)
        except StopTraining as stop:
            self.reason = str(stop)
            return "resumable"
        if self.at_end and self.unlogged is None:
            return "finished"
        self.reason = f"stopped by {self.stop.received.name if self.stop.received else 'a signal to another rank'}"
        return "resumable"

    def _train_step(self, step: StepData, data: Prefetch) -> tuple[StepReport, StepConsensus]:
        """Train one step; return its values and the consensus of the ranks."""
        data.pop_wait_seconds()
        started, processor_started = time.perf_counter(), time.process_time()
        self._count(step.rows)
        self._set_learning_rate()
        logged = self.at_end or self.progress.step == 1 or self.is_due(self.config.monitor.log_every)
        measured = self._measure_gradients(step)
        measures_layers = self._begin_layer_measurements()
        consensus, pool, score, skip_update = self._compute(step, data, with_pool=logged)
        if measures_layers:
            measured |= self.engine.module.measurements.take(self.objective, self.engine.optimizer, self.world)
        updated = self._update(consensus.losses, skip_update)
        embeddings = self._diagnose(pool)
        self.step_seconds = time.perf_counter() - started
        self.progress.seconds += self.step_seconds
        if self.world.device.type == "cpu":
            self.progress.processor_seconds += time.process_time() - processor_started
        self.throughput.add(
            step.rows,
            step.targets,
            self.step_seconds,
            data.pop_wait_seconds(),
            self.objective.flops(step.loss_denominators, self.throughput.parameters.head),
        )
        if self.saver.in_progress and not consensus.saving:
            self.finish_save()
        values = measured | (self._step_values(consensus.losses, score) if logged or not updated else {})
        if logged:
            values |= self._objective_values(step) | embeddings | self.throughput.take()
        return StepReport(values, logged, score), consensus

    def _finish_step(self, report: StepReport) -> bool:
        """Call the hooks after a step; return False if a signal interrupted the validation."""
        self.call_hooks(lambda hook: hook.after_step(self, report))
        return self.unlogged is None

    def report_progress(self) -> None:
        """Report to the watchdog that this rank is making progress."""
        self.watchdog.report_progress(self.progress.step)

    def _report_hang(self, line: str) -> None:
        """Print the error of a run that hangs, and mark the run as resumable."""
        self.print_fatal(f"error: {line}; ending the run; to resume it, run the same command again")
        steps = list_steps(self.config.run_dir / "checkpoints")
        write_status(self.config.run_dir, "resumable", steps[-1] if steps else 0, line)

    def stop_requested(self) -> bool:
        """Return whether any rank has received a signal to stop. All ranks must call this together."""
        self.report_progress()
        return self.world.sum([torch.tensor(self.stop.received is not None, device=self.world.device)])[0] > 0

    @property
    def fraction(self) -> float:
        """Consumed fraction of the budget."""
        return consumed_fraction(self.progress.consumed, self.config.train, self.loader.records)

    @property
    def at_end(self) -> bool:
        """Whether the budget is used up."""
        return self.fraction >= 1

    @property
    def last_logged_step(self) -> int:
        """Last step whose values have been logged."""
        return self.progress.step - (self.unlogged is not None)

    @property
    def pool_rows(self) -> int:
        """Number of rows of a micro step over all ranks. The pairs of these rows form a pool."""
        return self.config.train.micro_batch_rows * self.world.size

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each loss term at this step."""
        factor = self.config.objective.factor(self.fraction)
        return {
            term: weight if term in ("lm", Z_LOSS) else weight * factor
            for term, weight in self.objective.weights.items()
        }

    def is_due(self, every: int) -> bool:
        """Return whether this step is one of every `every` steps."""
        return self.progress.step % every == 0

    def _count(self, rows: Rows) -> None:
        self._consumed_before = self.progress.consumed
        self.progress.step += 1
        self.progress.records += len(rows.records)
        self.progress.tokens += int(rows.lengths.sum())
        self.progress.positions += int(rows.segment_lengths.sum())

    def _set_learning_rate(self) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(*self._budget_use(self.progress.consumed), self.config.train)

    def _budget_use(self, consumed: Consumed) -> tuple[float, float]:
        return budget_use(consumed, self.config.train, self.loader.records)

    def _decay_begins(self) -> bool:
        """Return whether the next step may be the first one of the decay of warmup_stable_decay.

        With a budget in steps this is exact. Otherwise the next step is assumed to be up to twice as large as this one.
        """
        train, now = self.config.train, self.progress.consumed
        if train.schedule != "warmup_stable_decay" or is_decaying(*self._budget_use(now), train):
            return False
        size = 1 if train.steps is not None else 2
        largest = (after + size * (after - before) for after, before in zip(now, self._consumed_before, strict=True))
        return is_decaying(*self._budget_use(Consumed(*largest)), train)

    def _compute(
        self, step: StepData, data: Prefetch, with_pool: bool
    ) -> tuple[StepConsensus, Pool | None, float, bool]:
        """Run the forward and backward passes over this rank's micro batches.

        Return the consensus of all ranks, the last pool, the spike score of the loss, and whether the step is skipped.

        The ranks reach their consensus before the last backward pass. If the step is skipped, that pass makes the
        gradient NaN on all ranks, so DeepSpeed makes no update.
        """
        sums: dict[str, torch.Tensor] = {}
        weights = self.weights
        for number, batch in enumerate(step.batches, start=1):
            self.report_progress()
            output = self.engine(batch.to(self.world.device), with_pool=with_pool)
            loss = total_loss(output.terms, step.loss_denominators, weights, self.world.size)
            for name, value in output.terms.items():
                sums[name] = sums.get(name, 0) + value.detach()
            if number < len(step.batches):
                self.engine.backward(loss, scale_wrt_gas=False)
                self.engine.step()
        consensus = self._reach_consensus(sums, step.loss_denominators, data.failed())
        score, skip_update = self.spikes.judge(self, consensus.losses, step.loss_denominators)
        self.engine.backward(loss * (torch.nan if skip_update else 1.0), scale_wrt_gas=False)
        return consensus, output.pool and output.pool.detached(), score, skip_update

    def total_loss(self, losses: Mapping[str, float]) -> float:
        """Return the weighted sum of the losses of a step."""
        return sum(self.weights[name] * value for name, value in losses.items())

    def _measure_gradients(self, step: StepData) -> dict[str, float]:
        """Return the gradient diagnostics of the step; empty if they are not due."""
        every = self.config.monitor.gradients_every
        if not every or not self.is_due(every):
            return {}
        return gradient_diagnostics(
            self.engine.module, step.batches, step.loss_denominators, self.weights, self.world, self.report_progress
        )

    def _begin_layer_measurements(self) -> bool:
        """Return whether the layers are measured in this step; if so, begin."""
        every = self.config.monitor.layers_every
        if not every or not self.is_due(every):
            return False
        self.engine.module.measurements.begin()
        return True

    def _micro_batches(self, rows: Rows) -> Iterator[Batch]:
        loader = self.loader
        return micro_batches(
            rows,
            loader.corpus,
            loader.layout,
            self.specials,
            loader.row_length,
            micro_batch_rows=self.config.train.micro_batch_rows,
            rank=self.world.rank,
            ranks=self.world.size,
        )

    def _reach_consensus(
        self, sums: dict[str, torch.Tensor], divisors: dict[str, int], data_failed: bool
    ) -> StepConsensus:
        """Combine the losses and flags of all ranks. This is the only synchronisation of a step."""
        flags = torch.tensor(
            [self.stop.received is not None, data_failed, self.saver.writing], device=self.world.device
        )
        *totals, stops, failures, writers = self.world.sum([*sums.values(), *flags])
        losses = {name: total / divisors[name] for name, total in zip(sums, totals, strict=True) if divisors[name]}
        return StepConsensus(losses, stops > 0, failures > 0, writers > 0)

    def _update(self, losses: dict[str, float], skip_update: bool) -> bool:
        """Run the optimizer step and return whether it updated the weights; count and report a skipped step."""
        skipped_before = self.engine.skipped_steps
        self.saver.before_update()
        self.engine.step()
        updated = self.engine.skipped_steps == skipped_before
        if not updated:
            self.progress.skipped_steps += 1
            nonfinite_terms = " and ".join(name for name, value in losses.items() if not math.isfinite(value))
            if nonfinite_terms:
                reason = f"{nonfinite_terms} was not finite on some rank"
            elif self.progress.step in self.spikes.excluded_steps:
                reason = "its records were excluded by an earlier rewind"
            elif skip_update:
                reason = "its loss is a spike"
            else:
                reason = "the gradient was not finite on some rank"
            logger.warning(
                f"step {self.progress.step} was skipped: {reason} ({self.progress.skipped_steps} skipped steps so far)"
            )
        return updated

    def _diagnose(self, pool: Pool | None) -> dict[str, float]:
        """Return the embedding monitors of a pool by metric tag; empty except on the main rank."""
        monitors = embedding_monitors(pool) if pool and self.world.is_main else {}
        return {f"{self.config.objective.embedding_group}/{name}": value for name, value in monitors.items()}

    def _step_values(self, losses: dict[str, float], score: float) -> dict[str, float]:
        return (
            {"loss/total": self.total_loss(losses), "loss/spike_score": score}
            | {f"loss/{name}": value for name, value in losses.items()}
            | {
                "optimizer/lr": self.engine.optimizer.param_groups[0]["lr"],
                "optimizer/grad_norm": float(self.engine.get_global_grad_norm()),
                "optimizer/skipped_steps": self.progress.skipped_steps,
                "throughput/checkpoint_seconds": self.saver.pop_seconds(),
                "checkpoint/failed": self.saver.failed,
            }
        )

    def _objective_values(self, step: StepData) -> dict[str, float]:
        """Return the factor on the weights of the auxiliary terms, and the number of pairs in the step."""
        return {
            "objective/factor": self.config.objective.factor(self.fraction),
            "objective/pairs": count_pairs(step.rows, self.loader.layout),
        }

    def counters(self) -> dict[str, float]:
        """Return the progress counters and the epoch."""
        return self.progress.state() | {"epoch": self.progress.records / self.loader.order.epoch_records}

    def _save(self, loader_state: dict[str, Any]) -> None:
        self.call_hooks(lambda hook: hook.before_save(self))
        with self.watchdog.extended_timeout():
            state = {
                "progress": self.progress.state(),
                "loader": loader_state,
                "owed": self.unlogged,
                "weights": self.saver.timed(lambda: weight_sums(self.engine.module, self.world)),
            }
            for hook in self.hooks:
                state |= hook.state()
            self.saver.begin(self.progress.step, state)

    def finish_save(self) -> None:
        """Wait until the checkpoint that is being written is complete. All ranks must call this together."""
        with self.watchdog.extended_timeout():
            self.saver.finish()

    def _on_saved(self, step: int) -> None:
        if self.world.is_main:
            write_status(self.config.run_dir, "running", step)
        self.call_hooks(lambda hook: hook.after_save(self, step))

    def resume(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.progress = Progress(**state["progress"])
        self.loader.load_state(state["loader"], self.progress.consumed)
        self.unlogged = state["owed"]
        for hook in self.hooks:
            hook.load_state(state)
