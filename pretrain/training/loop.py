"""The training loop."""

import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import deepspeed
import torch

from pretrain.config import RunConfig
from pretrain.data.batch import Batch, micro_batches
from pretrain.data.layout import Specials
from pretrain.data.loader import Loader, Rows
from pretrain.data.prefetch import Prefetch
from pretrain.objectives import Objective, Output, total_loss
from pretrain.objectives.monitors import embedding_monitors, has_collapsed
from pretrain.objectives.pool import Pool
from pretrain.run_folder import write_status
from pretrain.training import checkpoint
from pretrain.training.background import ask_for_evaluation, start_evaluations
from pretrain.training.distributed import World
from pretrain.training.gradients import gradient_diagnostics
from pretrain.training.metrics import Metrics
from pretrain.training.progress_line import collapse_warning, progress_line, validation_line
from pretrain.training.schedule import Progress, consumed_fraction, learning_rate
from pretrain.training.throughput import Throughput
from pretrain.training.validation import Validation


class StopRequest:
    """Set by SIGTERM, SIGINT or SIGUSR1. A second signal ends the process at once, but not within GRACE seconds:

    launchers pass a signal on that their ranks have had already from the terminal or the scheduler.
    """

    GRACE = 10.0

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.since = 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:
            if time.monotonic() - self.since < self.GRACE:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received, self.since = signal.Signals(number), time.monotonic()


@dataclass
class Trainer:
    """Everything a training run is made of."""

    config: RunConfig
    world: World
    engine: deepspeed.DeepSpeedEngine
    loader: Loader
    specials: Specials
    objective: Objective
    throughput: Throughput
    validation: Validation | None
    metrics: Metrics | None = None
    """On rank 0 only."""
    lock: IO[bytes] | None = None
    """Of the run directory, held by rank 0."""
    progress: Progress = field(default_factory=Progress)
    stop: StopRequest = field(default_factory=StopRequest)
    collapsed: bool = False

    def train(self) -> str:
        """Train until the budget is used up or a signal comes; return the final status. Raises UserError, on all ranks, for a damaged shard."""
        with Prefetch(self.loader, self.config.train.global_batch_rows, self._micro_batches, self.world.device) as data:
            return self._train(data)

    def _train(self, data: Prefetch) -> str:
        stopping, data_failed = False, True  # not known yet
        while self.fraction < 1 and not stopping:
            step = self.world.agree(data.next) if data_failed else data.next()
            data.take_waited()
            started = time.perf_counter()
            divisors = {term: step.counts[unit] for term, unit in self.objective.units.items()}
            self._count(step.rows)
            self._set_learning_rate()
            last = self.fraction >= 1
            logging = last or self.progress.step == 1 or self._due(self.config.monitor.log_every)
            gradients, aside = self._gradients(step.batches, divisors)

            sums, pool = self._accumulate(step.batches, divisors, with_pool=logging)
            losses, stopping, data_failed = self._agree(sums, divisors, data.failed())
            updated = self._update(losses)
            seconds = time.perf_counter() - started - aside
            self.progress.seconds += seconds
            self.throughput.add(step.rows, step.counts["targets"], seconds, data.take_waited())

            values = gradients | (self._values(losses) if logging or not updated else {})
            if logging:
                values |= self._diagnose(pool) | self.throughput.take()
                self._say(progress_line(self.progress, self.fraction, values))
                if not self.validation:
                    self._watch_for_collapse(values, "embedding/")
            if self.validation and (last or self._due(self.config.monitor.validate_every)):
                values |= self._validate()
            if self.metrics and values:
                self.metrics.write(self._counters(), values)
            if last or stopping or data_failed or self._due(self.config.checkpoint.every):
                self._save(step.state)
        return "resumable" if self.fraction < 1 else "finished"

    @property
    def fraction(self) -> float:
        """Share of the budget that is consumed."""
        return consumed_fraction(self.progress, self.config.train, self.loader.records)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term at this step."""
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

    def _accumulate(self, batches: Sequence[Batch], divisors: dict[str, int], with_pool: bool) -> tuple[dict[str, torch.Tensor], Pool | None]:
        """Forward and backward over this rank's micro batches; each term's sum over them, and the last pool.

        `divisors` is what each term is normalised by: target tokens, pairs or spans of the whole global batch.
        """
        sums: dict[str, torch.Tensor] = {}
        output = Output({}, None)
        weights = self.weights
        for batch in batches:
            output = self.engine(batch.to(self.world.device), with_pool=with_pool)
            loss = total_loss(output.terms, divisors, weights, self.world.size)
            # a term that is not finite makes the whole gradient NaN, on every rank: DeepSpeed then leaves the step out
            loss = loss * torch.where(loss.isfinite(), 1.0, float("nan"))
            self.engine.backward(loss, scale_wrt_gas=False)
            for name, value in output.terms.items():
                sums[name] = sums.get(name, 0) + value.detach()
            if self.engine.is_gradient_accumulation_boundary():
                break
            self.engine.step()
        return sums, output.pool and output.pool.detached()

    def _gradients(self, batches: Sequence[Batch], divisors: dict[str, int]) -> tuple[dict[str, float], float]:
        """The terms' gradients on the steps that measure them, and the seconds that took."""
        every = self.config.monitor.gradients_every
        if not every or not self._due(every):
            return {}, 0.0
        started = time.perf_counter()
        values = gradient_diagnostics(self.engine.module, batches, divisors, self.weights, self.world)
        return values, time.perf_counter() - started

    def _micro_batches(self, rows: Rows) -> Iterator[Batch]:
        loader = self.loader
        return micro_batches(rows, loader.corpus, loader.layout, self.specials, loader.row_length,
                             micro_batch_rows=self.config.train.micro_batch_rows, rank=self.world.rank, ranks=self.world.size)

    def _agree(self, sums: dict[str, torch.Tensor], divisors: dict[str, int], data_failed: bool) -> tuple[dict[str, float], bool, bool]:
        """Each term over the global batch, and whether any rank was asked to stop or has no data for the next step.

        The one synchronisation of a step.
        """
        flags = torch.tensor([self.stop.received is not None, data_failed], device=self.world.device)
        *totals, stops, failures = self.world.sum([*sums.values(), *flags])
        return {name: total / max(1, divisors[name]) for name, total in zip(sums, totals, strict=True)}, stops > 0, failures > 0

    def _update(self, losses: dict[str, float]) -> bool:
        """Take the optimizer step; count and report it where DeepSpeed left it out."""
        skipped_before = self.engine.skipped_steps
        self.engine.step()
        updated = self.engine.skipped_steps == skipped_before
        if not updated:
            self.progress.skipped_steps += 1
            culprits = [name for name, value in losses.items() if not abs(value) < float("inf")] or ["the gradient"]
            self._say(f"WARNING: step {self.progress.step} made no update: {' and '.join(culprits)} was not finite on some rank "
                      f"({self.progress.skipped_steps} such steps so far)")
        return updated

    def _diagnose(self, pool: Pool | None) -> dict[str, float]:
        return {f"embedding/{name}": value for name, value in (embedding_monitors(pool) if pool else {}).items()}

    def _values(self, losses: dict[str, float]) -> dict[str, float]:
        weights = self.weights
        total = sum(weights[name] * value for name, value in losses.items())
        return {"loss/total": total} | {f"loss/{name}": value for name, value in losses.items()} | {
            "optimizer/lr": self.engine.optimizer.param_groups[0]["lr"],
            "optimizer/grad_norm": float(self.engine.get_global_grad_norm()),
            "optimizer/skipped_steps": self.progress.skipped_steps,
        }

    def _validate(self) -> dict[str, float]:
        values = self.validation.run(self.engine, self.objective.units)
        self._say(validation_line(self.progress, values))
        self._watch_for_collapse(values, "validation/embedding/")
        return values

    def _watch_for_collapse(self, values: dict[str, float], prefix: str) -> None:
        """Warn when the embeddings of the monitors under a prefix of tags have collapsed since the last look."""
        monitors = {tag.removeprefix(prefix): value for tag, value in values.items() if tag.startswith(prefix)}
        was, self.collapsed = self.collapsed, self.config.objective.pairing is not None and has_collapsed(monitors)
        if self.collapsed and not was:
            self._say(collapse_warning(monitors))

    def _counters(self) -> dict[str, float]:
        return self.progress.state() | {"epoch": self.progress.records / self.loader.order.epoch_records}

    def _save(self, loader_state: dict[str, int]) -> None:
        if self.metrics:
            self.metrics.flush()
        step, folder = self.progress.step, self.config.run_dir
        evaluating = self.world.is_main and self.config.evaluation.every and self._due(self.config.evaluation.every)
        if evaluating:
            ask_for_evaluation(folder, step)
        state = {"progress": self.progress.state(), "loader": loader_state, "collapsed": self.collapsed}
        checkpoint.save(self.engine, folder / "checkpoints", step, state, self.config.checkpoint.keep, self.world)
        if self.world.is_main:
            write_status(folder, "running", step)
        if evaluating:
            self._say(f"evaluating step {step} in the background, log in {folder / 'evaluation' / 'log.txt'}")
            start_evaluations(folder)

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self.progress = Progress(**state["progress"])
        self.loader.load_state(state["loader"])
        self.collapsed = state["collapsed"]

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)
