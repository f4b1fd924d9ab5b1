"""Time and memory of optimizer steps on the project's engine, for the arms of cost_arms.py."""

import argparse
import ctypes
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import deepspeed
import numpy as np
import torch
from cost_arms import BASELINE, OBJECTIVES, SEVERAL_PASSES, Arm, combine, make_arms

from data_prep.layout import SpecialTokenIds
from pretrain.config import RunConfig, load_config
from pretrain.data.batch import micro_batches
from pretrain.data.corpus import Corpus
from pretrain.data.loader import Rows, count_ends, count_pairs, count_targets, draw_random_bits, loss_denominators
from pretrain.models.language_model import special_ids
from pretrain.objectives.base import total_loss
from pretrain.planning.flops import count_parameters
from pretrain.training.distributed import World
from pretrain.training.engine import build_engine

WEIGHTS = {"lm": 1.0, "jepa": 1.0, "kl": 1.0, "coding_rate": 0.5}
WARMUP_STEPS = {"cpu": 0, "cuda": 2}
"""Number of untimed steps after a change of arm, because DeepSpeed prefetches partitioned parameters in the order of
the previous step."""


@dataclass
class Measurement:
    """Measurements of an arm."""

    rows: list[Rows]
    """Rows of a step, one entry per pass."""
    row_lengths: list[int]
    """Length of a row, one entry per pass."""
    targets: int
    micro_steps: int
    losses: dict[str, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    """Duration of a step in seconds, by round."""
    processor_seconds: dict[int, float] = field(default_factory=dict)
    """Processor time of a step in seconds, summed over ranks and their threads, by round."""
    peak_memory: float | None = None

    @property
    def positions(self) -> int:
        """Number of positions of a step, without padding."""
        return sum(int(rows.segment_lengths.sum()) for rows in self.rows)

    @property
    def slots(self) -> int:
        """Number of slots of a step: its positions and the padding."""
        return sum(rows.count * length for rows, length in zip(self.rows, self.row_lengths, strict=True))


@dataclass
class Bench:
    """The arms, their engines and their measurements."""

    config: RunConfig
    world: World
    corpus: Corpus
    specials: SpecialTokenIds
    arms: dict[str, Arm]
    engines: dict[str, deepspeed.DeepSpeedEngine]
    """Engines by name in OBJECTIVES. The weights of their models are equal."""
    attention: str
    """Attention implementation for packed rows."""
    records: np.ndarray
    random_bits: np.ndarray
    slots_per_micro_step: int
    measured: dict[str, Measurement]

    @staticmethod
    def build(arguments: argparse.Namespace, config: RunConfig, world: World) -> "Bench":
        """Build models with equal weights, and choose the records of a step."""
        corpus = Corpus(config.data.path, "train")
        names = {
            arm.engine for name, arm in make_arms(SpecialTokenIds(0, 0, 0, 0, 0)).items() if name in arguments.arms
        }
        engines = {
            name: build_engine(
                load_config(
                    arguments.folder / "config.yaml",
                    [f"objective={settings}", f"monitor.gradients_every={10**9 if name == SEVERAL_PASSES else 0}"],
                ),
                corpus.tokenizer,
                world,
            )
            for name, settings in OBJECTIVES.items()
            if name in names | {"next_token"}
        }
        for engine in engines.values():
            for group in engine.optimizer.param_groups:
                group["lr"] = 0.0
        model = engines["next_token"].module.model
        specials = special_ids(corpus.tokenizer, model.vocab_size)
        arms = {name: arm for name, arm in make_arms(specials).items() if name == BASELINE or name in arguments.arms}
        records = np.arange(arguments.records)
        bench = Bench(
            config,
            world,
            corpus,
            specials,
            arms,
            engines,
            model.attention,
            records,
            draw_random_bits(records, config.seed, np.zeros_like(records)),
            arguments.micro_slots,
            {},
        )
        bench.measured = {name: bench.start_measurement(arm) for name, arm in bench.arms.items()}
        return bench

    def plan(self, arm: Arm) -> tuple[list[Rows], list[int]]:
        """Return the packed rows of a step and the row length of each pass."""
        paired = self.random_bits >= np.uint64(arm.dropout * 2**64)
        length = self.config.data.sequence_length
        switch = round(arm.active * len(self.records))
        parts = [slice(0, switch), slice(switch, None)] if switch < len(self.records) else [slice(None)]
        plans, lengths = [], []
        for forward_pass in arm.passes:
            planned = [
                forward_pass.plan(
                    self.corpus,
                    self.records[part],
                    length,
                    paired[part] & bool(forward_pass.layout.read_outs) & (number == 0),
                    self.random_bits[part],
                )
                for number, part in enumerate(parts)
            ]
            plans.append(Rows.join([rows for rows, _ in planned], sum(rows.count for rows, _ in planned)))
            lengths.append(planned[0][1])
        return plans, lengths

    def split(self, rows: list[Rows], lengths: list[int]) -> tuple[list[Rows], int]:
        """Add empty rows until all ranks have equal micro batches; return the rows and the number of micro steps."""
        slots = sum(pass_rows.count * length for pass_rows, length in zip(rows, lengths, strict=True))
        micro_steps = -(-slots // (self.slots_per_micro_step * self.world.size))
        # Padded arms have one record per row: choose a number of micro steps that needs no empty rows.
        while len(rows) > 1 and len(self.records) % (micro_steps * self.world.size):
            micro_steps += 1
        unit = micro_steps * self.world.size
        return [Rows.join([pass_rows], -(-pass_rows.count // unit) * unit) for pass_rows in rows], micro_steps

    def start_measurement(self, arm: Arm) -> Measurement:
        """Return a new measurement with the rows, targets and micro steps of an optimizer step of an arm."""
        rows, lengths = self.plan(arm)
        rows, micro_steps = self.split(rows, lengths)
        return Measurement(rows, lengths, count_targets(rows[0], arm.passes[0].layout), micro_steps)

    def counts(self, arm: Arm, rows: list[Rows]) -> dict[str, int]:
        """Return the count of each loss term in the planned rows of a step."""
        if arm.objective:
            return loss_denominators(rows[0], arm.passes[0].layout, self.engines[arm.engine].module.objective.units)
        return {
            "lm": count_targets(rows[0], arm.passes[0].layout),
            "jepa": count_pairs(rows[-1], arm.passes[-1].layout),
            "coding_rate": count_ends(rows[0], arm.passes[0].layout),
        }

    def flops(self, name: str) -> float:
        """Return the FLOPs of a step of an arm, without padding and attention scores."""
        arm, measured = self.arms[name], self.measured[name]
        module = self.engines[arm.engine].module
        parameters = count_parameters(module.model, module.objective)
        own = module.objective.flops(self.counts(arm, measured.rows), parameters.head) if arm.objective else 0.0
        return sum(parameters.flops(measured.positions, measured.targets)) + own

    def step(self, name: str) -> dict[str, float]:
        """Run one optimizer step, including the planning of its rows, and return the losses."""
        arm = self.arms[name]
        engine = self.engines[arm.engine]
        rows, lengths = self.plan(arm)
        rows, micro_steps = self.split(rows, lengths)
        counts = self.counts(arm, rows)
        streams = [
            micro_batches(
                pass_rows,
                self.corpus,
                forward_pass.layout,
                self.specials,
                length,
                micro_batch_rows=pass_rows.count // (micro_steps * self.world.size),
                rank=self.world.rank,
                ranks=self.world.size,
            )
            for forward_pass, pass_rows, length in zip(arm.passes, rows, lengths, strict=True)
        ]
        sums: dict[str, torch.Tensor] = {}
        for micro_step, batches in enumerate(zip(*streams, strict=True)):
            engine.set_gradient_accumulation_boundary(micro_step == micro_steps - 1)
            terms: dict[str, torch.Tensor] = {}
            for forward_pass, batch in zip(arm.passes, batches, strict=True):
                if forward_pass.read is not None:
                    engine.module.objective = forward_pass.read
                terms |= engine(
                    forward_pass.prepare(batch.to(self.world.device), engine.module.model, self.attention)
                ).terms
            terms = combine(terms)
            engine.backward(
                total_loss(terms, counts, WEIGHTS, self.world.size),
                scale_wrt_gas=False,
            )
            engine.step()
            for term, value in terms.items():
                sums[term] = sums.get(term, 0) + value.detach()
        totals = self.world.sum(list(sums.values()))
        return {term: total / counts[term] for term, total in zip(sums, totals, strict=True)}

    def time(self, name: str, round_number: int, steps: int) -> None:
        """Record the mean duration of a step in this round.

        As many steps are run as take about as long as `steps` steps of the baseline.
        """
        measured = self.measured[name]
        steps = max(1, round(steps * self.measured[BASELINE].slots / measured.slots))
        for _ in range(WARMUP_STEPS[self.world.device.type]):
            self.step(name)
        self._wait()
        started, cpu_started = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step(name)
        self._wait()
        measured.seconds[round_number] = (time.perf_counter() - started) / steps
        measured.processor_seconds[round_number] = self._total(time.process_time() - cpu_started) / steps

    def measure_peak_memory(self, name: str) -> float | None:
        """Return the peak memory of a step above the memory held before it, in bytes, summed over ranks.

        Also stores the losses of the step in the measurement of the arm.
        """
        before = reset_peak_memory(self.world.device)
        self.measured[name].losses = self.step(name)
        peak = peak_memory(self.world.device)
        return None if before is None or peak is None else self._total(peak - before)

    def _total(self, value: float) -> float:
        """Return the sum of a value over ranks."""
        return self.world.sum([torch.tensor(float(value), device=self.world.device)])[0]

    def _wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        self.world.barrier()


def reset_peak_memory(device: torch.device) -> int | None:
    """Reset the recorded peak, and return the number of bytes that are held now.

    On CUDA, only tensors are counted; on CPU, the complete process. Returns None if the system does not report them.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        # Memory freed by the previous arm would otherwise hide the need of this one.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak (proc(5))
    except (OSError, AttributeError):
        return None
    return _status_bytes("VmRSS")


def peak_memory(device: torch.device) -> int | None:
    """Return the largest number of bytes held since `reset_peak_memory`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(key: str) -> int | None:
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else None
