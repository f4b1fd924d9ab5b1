"""Training runs for the checks of benchmarks/gpu.py, one after another in the same processes, optionally profiled.

    python benchmarks/gpu_runs.py CONFIG [CONFIG ...] [--profile STEP]

The last line of the output is a JSON object with the losses, speed and memory of each run. With --profile, it
includes the GPU activity in one step of the first run.
"""

import argparse
import gc
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_prep.utils.console import exit_on_user_error
from pretrain.config import load_config
from pretrain.training.distributed import World, init_world, leave_group
from pretrain.training.setup import set_up

SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LISTED_KERNELS = 10
"""Number of kernels to list, in descending order of total time."""
WARMUP_STEPS = 2
"""Number of steps in which graphs may be compiled; the checks fail if graphs are compiled later."""


@dataclass
class Profiler:
    """A hook that profiles one step of a run and records the number of compiled graphs after the warm-up.

    A step starts at the forward pass of its first micro batch and ends where the next step starts.
    """

    profiled_step: int | None
    """Step to profile, counted from 1; None for no profile."""
    micro_steps: int
    passes: int = 0
    profile: Any = None
    started: float = 0.0
    graphs_after_warmup: int = 0
    activity: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *_: Any) -> None:
        """Start or stop profiling; called before each forward pass."""
        self.passes += 1
        step, micro_step = divmod(self.passes - 1, self.micro_steps)
        if micro_step > 0:
            return
        if step == WARMUP_STEPS:
            self.graphs_after_warmup = compiled_graph_count()
        if self.profile is not None:
            torch.cuda.synchronize()
            seconds = time.perf_counter() - self.started
            self.profile.__exit__(None, None, None)
            self.activity = summarize_gpu_activity(self.profile.events(), seconds)
            self.profile = None
        if step + 1 == self.profiled_step and torch.cuda.is_available():
            torch.cuda.synchronize()
            self.profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            )
            self.profile.__enter__()
            self.started = time.perf_counter()


def main() -> None:
    """Run all trainings, and print the results on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument(
        "--profile", type=int, help="step to profile in the first run, counted from 1; not the last step"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    world = init_world()
    runs = {}
    for number, path in enumerate(arguments.configs):
        runs[path.stem] = run(path, world, arguments.profile if number == 0 else None)
    if world.is_main:
        print(json.dumps(runs), flush=True)
    leave_group(0)


def run(path: Path, world: World, profiled_step: int | None) -> dict[str, Any]:
    """Run one training and return its results, including this rank's memory use in bytes."""
    config = load_config(path)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = set_up(config, world)
    assert trainer is not None
    profiler = Profiler(profiled_step, config.train.global_batch_rows // (config.train.micro_batch_rows * world.size))
    trainer.engine.register_forward_pre_hook(profiler)
    trainer.train()
    results: dict[str, Any] = {
        "profile": profiler.activity,
        "graphs_after_settling": compiled_graph_count() - profiler.graphs_after_warmup,
        "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        "fused_optimizer": bool(trainer.engine.optimizer.optimizer.defaults["fused"]),
    }
    if torch.cuda.is_available():
        statistics = torch.cuda.memory_stats()
        results |= {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "allocator_retries": statistics.get("num_alloc_retries", 0),
        }
    if world.is_main:
        results["metrics"] = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    trainer.engine.destroy()
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return results


def compiled_graph_count() -> int:
    """Return the number of graphs that torch._dynamo has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def summarize_gpu_activity(events: Any, seconds: float) -> dict[str, Any]:
    """Summarize the GPU activity in a step: busy fraction, number of synchronisations, longest kernels."""
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    busy, end = 0.0, 0.0
    for start, stop in sorted((event.time_range.start, event.time_range.end) for event in on_device):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    kernels: dict[str, float] = {}
    for event in on_device:
        kernels[event.name[:80]] = kernels.get(event.name[:80], 0.0) + event.time_range.elapsed_us() / 1e3
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:LISTED_KERNELS]
    return {
        "seconds": seconds,
        "busy_share": busy / 1e6 / seconds,
        "kernel_milliseconds": dict(longest),
        "synchronisations": {name: sum(event.name == name for event in events) for name in SYNCHRONISATIONS},
    }


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    exit_on_user_error(main)
