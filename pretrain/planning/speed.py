"""The speed of this machine in training, measured on a few steps of a model with random weights."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from pretrain.models.language_model import build_model_config, random_causal_lm
from pretrain.planning.flops import Parameters

REPEATED = 2
"""Number of measured steps; the fastest one counts."""
MEASURED_POSITIONS = {"cpu": 1024, "cuda": 32_768}
"""Approximate number of positions of a measured step."""
EFFICIENCY = 0.7
"""Speed of a run relative to the measured steps, which have no optimizer, no packing and no ZeRO. With this value, the
prediction for 1.1 million parameters on two CPU processes was 3% below the processor time of a run."""


@dataclass(frozen=True)
class Machine:
    """The processors of this machine that a run uses."""

    device: str
    """cpu or cuda."""
    processes: int
    """Number of ranks: one per GPU, or up to two on the CPU."""

    @property
    def described(self) -> str:
        """Processors in a few words."""
        return f"{self.processes} {'GPU' if self.device == 'cuda' else 'CPU process'}" + (
            ("s" if self.device == "cuda" else "es") if self.processes > 1 else ""
        )


def this_machine() -> Machine:
    """Return the processors of this machine."""
    if torch.cuda.is_available():
        return Machine("cuda", torch.cuda.device_count())
    return Machine("cpu", min(2, len(os.sched_getaffinity(0))))


def measure_flops(machine: Machine, shape: dict[str, Any], vocabulary: int, length: int) -> float:
    """Return the FLOP/s of a run of a Llama of this shape with rows of `length`, over all processes.

    The FLOPs are counted as in the plan of a run. On CPU, the machine is assumed to run nothing else.
    """
    tokenizer: Any = SimpleNamespace(vocab_size=vocabulary, pad_id=0, bos_id=2, eos_id=3)
    config = build_model_config("llama", shape, tokenizer, length)
    dtype = torch.bfloat16 if machine.device == "cuda" else torch.float32
    threads = torch.get_num_threads()
    if machine.device == "cpu":  # as in a run: the processes of a machine divide its cores
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // machine.processes))
    try:
        model: Any = random_causal_lm(config, "sdpa", dtype).to(machine.device)
        rows = max(1, MEASURED_POSITIONS[machine.device] // length)
        tokens = torch.randint(5, vocabulary, (rows, length), device=machine.device)
        seconds = min(_step_seconds(model, tokens) for _ in range(REPEATED + 1))
    finally:
        torch.set_num_threads(threads)
    head = model.get_output_embeddings().weight.numel()
    layers = sum(parameter.numel() for parameter in model.parameters()) - head
    parameters = Parameters(layers, head, head, True, 0)
    keys = rows * length * (length + 1) / 2
    attention = 12 * keys * shape["num_hidden_layers"] * shape["hidden_size"]
    flops = sum(parameters.flops(rows * length, rows * length)) + attention
    return float(EFFICIENCY * machine.processes * flops / seconds)


def _step_seconds(model: Any, tokens: torch.Tensor) -> float:
    """Return the time of a forward and a backward pass; on CPU, processor time, which excludes other processes."""
    clock: Callable[[], float] = time.perf_counter if tokens.is_cuda else time.process_time
    started = clock()
    model(input_ids=tokens, labels=tokens).loss.backward()
    if tokens.is_cuda:
        torch.cuda.synchronize()
        return clock() - started
    return (clock() - started) / torch.get_num_threads()
