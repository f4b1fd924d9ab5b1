"""The training loop."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import deepspeed
import torch

from data_prep.layout import SpecialTokenIds
from data_prep.utils.console import UserError
from pretrain.config import RunConfig
from pretrain.data.batch import Batch, micro_batches
from pretrain.data.loader import Loader, Rows
from pretrain.data.prefetch import Prefetch, StepData
from pretrain.objectives.base import Objective, total_loss
from pretrain.objectives.monitors import embedding_monitors, has_collapsed
from pretrain.objectives.pool import Pool
from pretrain.planning.budget import Progress, consumed_fraction
from pretrain.run_folder import REWIND_REASON_PREFIX, list_steps, write_status
from pretrain.training.distributed import World
from pretrain.training.evaluation_requests import request_evaluation, start_evaluations
from pretrain.training.gradients import gradient_diagnostics
from pretrain.training.metrics import Metrics
from pretrain.training.progress_line import collapse_warning, progress_line, validation_line
from pretrain.training.rank_store import LocalRankStore, RankStore
from pretrain.training.saving import Saver
from pretrain.training.schedule import learning_rate
from pretrain.training.spikes import CannotRewind, SpikeRule, excluded_steps, rewind
from pretrain.training.stop import StopRequest
from pretrain.training.throughput import Throughput
from pretrain.training.validation import Validation
from pretrain.training.watchdog import Watchdog
from pretrain.training.weight_sums import weight_sums

LAUNCHER_GRACE = 30.0
"""Time after a signal until deepspeed, torchrun and, by default, Slurm kill the ranks, in seconds."""


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
    """The components and the state of a training run."""

    config: RunConfig
    world: World
    engine: deepspeed.DeepSpeedEngine
    loader: Loader
    specials: SpecialTokenIds
    objective: Objective
    throughput: Throughput
    validation: Validation | None
    metrics: Metrics | None = None
    """Writer of the metrics, on rank 0 only."""
    progress: Progress = field(default_factory=Progress)
    stop: StopRequest = field(default_factory=StopRequest)
    collapsed: bool = False
    spikes: SpikeRule = field(default_factory=SpikeRule)
    pending_validation: dict[str, float] | None = None
    """Values of the last step if a signal interrupted its validation; the next launch repeats that validation."""
    reason: str = ""
    """Reason why the run stopped before its end."""
    step_seconds: float = 0.0
    """Duration of the last step."""
    warned_about_launchers: bool = False
    print_fatal: Callable[[str], None] = field(default=partial(print, file=sys.stderr, flush=True))
    """Function that prints to the console, on any rank, why this process ends."""

    def __post_init__(self) -> None:
        self.saver = Saver(
            self.engine,
            self.config.run_dir / "checkpoints",
            self.config.checkpoint,
            self.world,
            self._say,
            self._on_saved,
        )
        self.excluded_steps = excluded_steps(self.config.run_dir)
        self.watchdog: Watchdog | None = None
        if self.world.rank_store is not None:  # from here on the peers wait for this rank
            self.watchdog = self._watch(self.world.rank_store)

    def train(self) -> str:
        """Train until the budget is used up or a signal arrives; return the final status.

        Raises UserError, on all ranks, if a shard is corrupt or the last checkpoint cannot be written.
        """
        if self.watchdog is None:
            self.watchdog = self._watch(LocalRankStore())
        ended = False
        try:
            with Prefetch(
                self.loader, self.config.train.global_batch_rows, self._micro_batches, self.world.device
            ) as data:
                status = self._train(data)
            self._finish_save()
            ended = True
        except UserError:  # all ranks raise it together
            self._finish_save()
            ended = True
            raise
        finally:
            self.saver.close()
            if self.watchdog:
                self.watchdog.close(ended)
        if self.saver.problem and not self.reason.startswith(REWIND_REASON_PREFIX):
            steps = list_steps(self.config.run_dir / "checkpoints")
            raise UserError(
                f"the last checkpoint was not written: {self.saver.problem}; once this is fixed, run the same command "
                + (f"again to resume from step {steps[-1]}" if steps else "again to start from the beginning")
            )
        return status

    def _train(self, data: Prefetch) -> str:
        stopping = self._stop_requested()
        data_failed = True  # the first step must check for data errors on all ranks
        if stopping:
            self.reason = self._stop_reason()
            return "resumable"
        if self.pending_validation is not None:
            stopping = not self._finish_step(self.pending_validation, validating=True)
        while self.fraction < 1 and not stopping:
            step = self.world.run_and_sync_errors(data.next) if data_failed else data.next()
            data.pop_wait_seconds()
            started = time.perf_counter()
            self._count(step.rows)
            self._set_learning_rate()
            last = self.fraction >= 1
            logging = last or self.progress.step == 1 or self._due(self.config.monitor.log_every)
            divisors = {term: step.loss_denominators[unit] for term, unit in self.objective.units.items()}
            gradients = self._measure_gradients(step, divisors)
            consensus, pool, score, skip_update = self._compute(step, divisors, data, with_pool=logging)
            updated = self._update(consensus.losses, skip_update)
            stopping, data_failed = consensus.stopping, consensus.data_failed
            embeddings = self._diagnose(pool)
            seconds = time.perf_counter() - started
            self.progress.seconds += seconds
            self.step_seconds = seconds
            self.throughput.add(step.rows, step.loss_denominators["targets"], seconds, data.pop_wait_seconds())
            if score > self.config.train.spike_score and self.config.train.on_spike == "rewind" and self._rewind(score):
                return "resumable"
            if self.saver.in_progress and not consensus.saving:
                self._finish_save()

            values = gradients | (self._step_values(consensus.losses, score) if logging or not updated else {})
            if logging:
                values |= embeddings | self.throughput.take()
                self._say(progress_line(self.progress, self.fraction, values, self.objective.units))
                if not self.validation:
                    self._watch_for_collapse(values, "embedding/")
            validating = bool(self.validation) and (last or self._due(self.config.monitor.validate_every))
            stopping |= not self._finish_step(values, validating)
            if last or stopping or data_failed or self._due(self.config.checkpoint.every):
                self._save(step.state)
        if self.fraction < 1 or self.pending_validation is not None:
            self.reason = self._stop_reason()
            return "resumable"
        return "finished"

    def _finish_step(self, values: dict[str, float], validating: bool) -> bool:
        """Validate if `validating`, and write the metrics of the step.

        Return False if a signal interrupted the validation; `pending_validation` then contains the values of the step.
        """
        validated = self._validate() if validating else {}
        self.pending_validation = values if validated is None else None
        if self.metrics and validated is not None and values | validated:
            self.metrics.write(self._counters(), values | validated)
        return validated is not None

    def _watch(self, rank_store: RankStore | LocalRankStore) -> Watchdog:
        return Watchdog(
            rank_store, self.world.rank, self.world.hosts, self.config.monitor.hang_seconds, self._report_hang
        )

    def _report_progress(self) -> None:
        if self.watchdog:
            self.watchdog.report_progress(self.progress.step)

    def _extended_timeout(self) -> AbstractContextManager:
        return self.watchdog.extended_timeout() if self.watchdog else nullcontext()

    def _report_hang(self, line: str) -> None:
        """Print the error of a run that hangs, and mark the run as resumable."""
        self.print_fatal(f"error: {line}; ending the run; to resume it, run the same command again")
        steps = list_steps(self.config.run_dir / "checkpoints")
        write_status(self.config.run_dir, "resumable", steps[-1] if steps else 0, line)

    def _stop_requested(self) -> bool:
        """Return whether any rank has received a signal to stop. All ranks must call this together."""
        self._report_progress()
        return self.world.sum([torch.tensor(self.stop.received is not None, device=self.world.device)])[0] > 0

    def _stop_reason(self) -> str:
        cause = self.stop.received.name if self.stop.received else "a signal to another rank"
        return f"stopped by {cause}"

    @property
    def fraction(self) -> float:
        """Consumed fraction of the budget."""
        return consumed_fraction(self.progress, self.config.train, self.loader.records)

    @property
    def pool_rows(self) -> int:
        """Number of rows of a micro step over all ranks. The pairs of these rows form a pool."""
        return self.config.train.micro_batch_rows * self.world.size

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each loss term at this step."""
        factor = self.config.objective.factor(self.fraction)
        return {term: weight if term == "lm" else weight * factor for term, weight in self.objective.weights.items()}

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0

    def _count(self, rows: Rows) -> None:
        self.progress.step += 1
        self.progress.records += len(rows.records)
        self.progress.tokens += int(rows.lengths.sum())
        self.progress.positions += int(rows.segment_lengths.sum())

    def _set_learning_rate(self) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.fraction, self.config.train)

    def _compute(
        self, step: StepData, divisors: dict[str, int], data: Prefetch, with_pool: bool
    ) -> tuple[StepConsensus, Pool | None, float, bool]:
        """Run the forward and backward passes over this rank's micro batches.

        Return the consensus of all ranks, the last pool, the spike score of the loss, and whether the step is skipped.

        `divisors` are the denominators of the terms: the numbers of target tokens, pairs or spans in the global batch.
        The ranks reach their consensus before the last backward pass. If the step is skipped, that pass makes the
        gradient NaN on all ranks, so DeepSpeed makes no update.
        """
        sums: dict[str, torch.Tensor] = {}
        weights = self.weights
        for number, batch in enumerate(step.batches, start=1):
            self._report_progress()
            output = self.engine(batch.to(self.world.device), with_pool=with_pool)
            loss = total_loss(output.terms, divisors, weights, self.world.size)
            for name, value in output.terms.items():
                sums[name] = sums.get(name, 0) + value.detach()
            if number < len(step.batches):
                self.engine.backward(loss, scale_wrt_gas=False)
                self.engine.step()
        consensus = self._reach_consensus(sums, divisors, data.failed())
        score, skip_update = self._judge(consensus.losses, divisors)
        self.engine.backward(loss * (torch.nan if skip_update else 1.0), scale_wrt_gas=False)
        if self.watchdog:
            self.watchdog.first_step_done()
        return consensus, output.pool and output.pool.detached(), score, skip_update

    def _judge(self, losses: dict[str, float], counts: dict[str, int]) -> tuple[float, bool]:
        """Return the highest spike score of the terms of a step, and whether to skip the step.

        `counts` are the numbers of tokens, pairs or spans over which the losses are means.
        """
        train = self.config.train
        if not math.isfinite(self._total_loss(losses)) or self.progress.step in self.excluded_steps:
            return 0.0, True
        score, highest = self.spikes.judge(losses, counts, self.weights)
        if score > train.spike_score:
            self._say(
                f"WARNING: the loss of step {self.progress.step} is a spike: loss/{highest} is {losses[highest]:.4f}, "
                f"{score:.1f} standard deviations above its recent values"
            )
        return score, score > train.spike_score and train.on_spike != "warn"

    def _total_loss(self, losses: dict[str, float]) -> float:
        return sum(self.weights[name] * value for name, value in losses.items())

    def _measure_gradients(self, step: StepData, divisors: dict[str, int]) -> dict[str, float]:
        """Return the gradient diagnostics of the step; empty if they are not due."""
        every = self.config.monitor.gradients_every
        if not every or not self._due(every):
            return {}
        return gradient_diagnostics(
            self.engine.module, step.batches, divisors, self.weights, self.world, self._report_progress
        )

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
            elif self.progress.step in self.excluded_steps:
                reason = "its records were excluded by an earlier rewind"
            elif skip_update:
                reason = "its loss is a spike"
            else:
                reason = "the gradient was not finite on some rank"
            self._say(
                f"WARNING: step {self.progress.step} was skipped: {reason} ({self.progress.skipped_steps} skipped "
                "steps so far)"
            )
        return updated

    def _rewind(self, score: float) -> bool:
        """Make the next launch resume from a checkpoint before this step; return False if that is not possible.

        The step is skipped in either case.
        """
        self._finish_save()
        step = self.progress.step
        resume_step = 0
        problem = ""
        if self.world.is_main:
            try:
                resume_step = rewind(self.config.run_dir, step, score)
            except CannotRewind as error:
                problem = str(error)
        resume_step, problem = self.world.gather_objects((resume_step, problem))[0]
        if problem:
            self._say(
                f"WARNING: cannot rewind before the spike of step {step} (score {score:.1f}): {problem}; skipping only "
                "this step"
            )
            return False
        self.reason = (
            f"{REWIND_REASON_PREFIX}: the loss of step {step} is a spike (score {score:.1f}); the next launch resumes "
            f"from step {resume_step} and skips steps {step - 1} and {step}"
        )
        self._say(f"WARNING: {self.reason}")
        return True

    def _diagnose(self, pool: Pool | None) -> dict[str, float]:
        """Return the embedding monitors of a pool by metric tag; empty except on the main rank."""
        monitors = embedding_monitors(pool) if pool and self.world.is_main else {}
        return {f"embedding/{name}": value for name, value in monitors.items()}

    def _step_values(self, losses: dict[str, float], score: float) -> dict[str, float]:
        return (
            {"loss/total": self._total_loss(losses), "loss/spike_score": score}
            | {f"loss/{name}": value for name, value in losses.items()}
            | {
                "optimizer/lr": self.engine.optimizer.param_groups[0]["lr"],
                "optimizer/grad_norm": float(self.engine.get_global_grad_norm()),
                "optimizer/skipped_steps": self.progress.skipped_steps,
                "throughput/checkpoint_seconds": self.saver.pop_seconds(),
                "checkpoint/failed": self.saver.failed,
            }
        )

    def _validate(self) -> dict[str, float] | None:
        assert self.validation is not None
        values = self.validation.run(self.engine, self.objective.units, self._stop_requested)
        if values is None:
            return None
        self._say(validation_line(self.progress, values, self.objective.units))
        self._watch_for_collapse(values, "validation/embedding/")
        return values

    def _watch_for_collapse(self, values: dict[str, float], prefix: str) -> None:
        """Warn if the embeddings have collapsed since the last check. The tags of the monitors start with `prefix`."""
        monitors = {tag.removeprefix(prefix): value for tag, value in values.items() if tag.startswith(prefix)}
        had_collapsed = self.collapsed
        self.collapsed = self.config.objective.pairing is not None and has_collapsed(monitors)
        if self.collapsed and not had_collapsed:
            self._say(collapse_warning(monitors))

    def _counters(self) -> dict[str, float]:
        return self.progress.state() | {"epoch": self.progress.records / self.loader.order.epoch_records}

    def _save(self, loader_state: dict[str, int]) -> None:
        if self.metrics:
            self.metrics.flush()
        step = self.progress.step
        if self._is_evaluated(step) and self.world.is_main:
            with self._warn_on_os_error(f"evaluation of step {step}"):
                request_evaluation(self.config.run_dir, step)
        with self._extended_timeout():
            weights = self.saver.timed(lambda: weight_sums(self.engine.module, self.world))
            self.saver.begin(
                step,
                {
                    "progress": self.progress.state(),
                    "loader": loader_state,
                    "collapsed": self.collapsed,
                    "losses": self.spikes.losses,
                    "pool_rows": self.pool_rows,
                    "owed": self.pending_validation,
                    "weights": weights,
                },
            )

    def _finish_save(self) -> None:
        with self._extended_timeout():
            self.saver.finish()

    def _on_saved(self, step: int) -> None:
        """Record a complete checkpoint, and start its evaluation if one is due."""
        if self.world.is_main:
            self._warn_about_launchers()
            write_status(self.config.run_dir, "running", step)
            if self._is_evaluated(step):
                device = self.config.evaluation.device
                self._say(
                    f"evaluating step {step} in the background on {device}, log: "
                    f"{self.config.run_dir / 'evaluation' / 'log.txt'}"
                )
                with self._warn_on_os_error(f"evaluation of step {step}"):
                    start_evaluations(self.config.run_dir, device)

    def _warn_about_launchers(self) -> None:
        """Warn once if a step and a save take longer than LAUNCHER_GRACE: a signal to the launcher would lose steps."""
        needed = self.step_seconds + self.saver.duration
        if self.world.size > 1 and not self.warned_about_launchers and needed > LAUNCHER_GRACE:
            self.warned_about_launchers = True
            self._say(
                f"note: a step and a save take {needed:.0f} s, but launchers kill the ranks {LAUNCHER_GRACE:.0f} s "
                "after Ctrl-C or SIGTERM, which loses the steps since the last checkpoint: to stop this run, send "
                "SIGUSR1 to one of its ranks"
            )

    @contextmanager
    def _warn_on_os_error(self, what: str) -> Iterator[None]:
        """Turn an OSError, such as a full disk, into a warning that `what` is skipped, instead of ending the run."""
        try:
            yield
        except OSError as error:
            self._say(f"WARNING: skipping the {what}: {error.strerror or error}")

    def _is_evaluated(self, step: int) -> bool:
        return bool(self.config.evaluation.every) and step % self.config.evaluation.every == 0

    def resume(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.progress = Progress(**state["progress"])
        self.loader.load_state(state["loader"])
        self.collapsed, self.pending_validation = state["collapsed"], state["owed"]
        # a contrastive loss depends on the size of the pool, so its old values are comparable only with the same size
        if state.get("pool_rows", self.pool_rows) == self.pool_rows:
            self.spikes.load(state["losses"])

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)
