"""One rank of objective_cost.py: times the arms of cost_arms.py alternately and writes the measurements as JSON."""

import argparse
import hashlib
import json
import statistics
from collections.abc import Collection
from typing import Any

import deepspeed
import numpy as np
import torch
from cost_arms import BASELINE
from cost_bench import Bench, Measurement

from pretrain.config import load_config
from pretrain.planning.flops import count_parameters, parameter_count
from pretrain.training.distributed import init_world
from pretrain.training.throughput import Throughput

ROUND_INTERVALS = {"three_passes_512": 3}
"""Interval between the rounds that include an arm. A step of this arm takes longer than a round of all others, and
its ratio needs less precision, so it is timed in every third round only."""
ONE_FORWARD = (
    "joint_packed",
    "independent_packed",
    "joint_dropout_0.75",
    "joint_active_0.25",
    "in_context_packed",
    "in_context_k0_packed",
    "regularized_packed",
    "nitp_packed",
    "nextlat_packed",
    "nextlat_kl_packed",
)
FLOPS_TARGET = 1.05
"""Upper limit for the arms of ONE_FORWARD: time per record divided by FLOPs per record, relative to the baseline."""
TIME_TARGETS = {"in_context_packed": 1.06}
"""Upper limit for the time of an arm for the same records, relative to the baseline."""
SPEEDUP_TARGETS = {"three_passes_512": 30.0, "three_passes_longest": 2.2}
"""Lower limit for the records per second of joint_packed, divided by the records per second of a
published method."""


def run_rank(arguments: argparse.Namespace) -> None:
    """Time all arms on this rank; rank 0 writes the result."""
    world = init_world()

    def log(text: str) -> None:
        if world.is_main:
            print(text, flush=True)

    bench = Bench.build(arguments, load_config(arguments.folder / "config.yaml"), world)
    for engine in bench.engines.values():  # the first step allocates the optimizer state and the gradient buffers
        bench.step(next(name for name, arm in bench.arms.items() if bench.engines[arm.engine] is engine))
    for name, measured in bench.measured.items():
        measured.peak_memory = bench.measure_peak_memory(name)
        log(f"{name}: losses {measured.losses}, {measured.micro_steps} micro steps")
    names = list(bench.arms)
    for number in range(arguments.rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            if number % ROUND_INTERVALS.get(name, 1) == 0:
                bench.time(name, number, arguments.steps)
                seconds = bench.measured[name].seconds[number]
                log(f"round {number + 1} of {arguments.rounds}: {name} {seconds:.2f} s per step")
    if world.is_main:
        (arguments.folder / "result.json").write_text(json.dumps(report(bench, arguments), indent=1))
    world.barrier()


def report(bench: Bench, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the JSON object with all measurements."""
    records, lengths = len(bench.records), bench.corpus.lengths(bench.records)
    arms = {name: describe(bench, name) for name in bench.arms}
    speedups = {}
    if "joint_packed" in arms:
        speedups = {
            name: spread(time_ratios(bench.measured[name], bench.measured["joint_packed"]))
            for name, arm in bench.arms.items()
            if len(arm.passes) > 1
        }
    return {
        "device": torch.cuda.get_device_name() if bench.world.device.type == "cuda" else "cpu",
        "ranks": bench.world.size,
        "threads_per_rank": torch.get_num_threads(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "precision": bench.config.train.precision,
        "zero_stage": 3,
        "model": arguments.model.name,
        "parameters": parameter_count(bench.engines["next_token"].module),
        "row_length": arguments.row_length,
        "records_per_step": records,
        "context_tokens_per_record": round(float(lengths[:, 0].mean()), 2),
        "target_tokens_per_record": round(float(lengths[:, 1].mean()), 2),
        "rounds": arguments.rounds,
        "baseline": BASELINE,
        "arms": arms,
        "records_per_second_of_joint_packed_over": speedups,
        "targets": {
            **{
                f"time_over_flops of {name}": check_target(
                    arms[name]["to_baseline"]["time_over_flops"]["median"], most=FLOPS_TARGET
                )
                for name in ONE_FORWARD
                if name in arms
            },
            **{
                f"time of {name}": check_target(arms[name]["to_baseline"]["time"]["median"], most=most)
                for name, most in TIME_TARGETS.items()
                if name in arms
            },
            **{
                f"joint_packed over {name}": check_target(speedups[name]["median"], least=least)
                for name, least in SPEEDUP_TARGETS.items()
                if name in speedups
            },
        },
    }


def describe(bench: Bench, name: str) -> dict[str, Any]:
    """Return the measurements of an arm, and the ratios to the baseline in the same rounds."""
    measured, baseline, records = bench.measured[name], bench.measured[BASELINE], len(bench.records)
    times = time_ratios(measured, baseline)
    positions = measured.positions / baseline.positions
    flops = bench.flops(name) / bench.flops(BASELINE)
    record_numbers = [np.sort(rows.records) for rows in measured.rows]
    assert all(np.array_equal(record_numbers[0], pass_records) for pass_records in record_numbers)
    return {
        "records_per_second": round(records / statistics.median(measured.seconds.values()), 2),
        "seconds_per_step": spread(measured.seconds.values()),
        "processor_seconds_per_step": spread(measured.processor_seconds.values()),
        "peak_memory_bytes": measured.peak_memory,
        "micro_steps": measured.micro_steps,
        "positions_per_record": round(measured.positions / records, 2),
        "slots_per_record": round(measured.slots / records, 2),
        **({"mfu": mfu} if (mfu := model_flops_utilisation(bench, measured)) is not None else {}),
        "losses_at_start": measured.losses,
        "records": {"count": len(record_numbers[0]), "sha256": hashlib.sha256(record_numbers[0].tobytes()).hexdigest()},
        "to_baseline": {
            "records_per_second": spread([1 / ratio for ratio in times]),
            "time": spread(times),
            "positions": round(positions, 4),
            "flops": round(flops, 4),
            "slots": round(measured.slots / baseline.slots, 4),
            "time_over_positions": spread([ratio / positions for ratio in times]),
            "time_over_flops": spread([ratio / flops for ratio in times]),
            "time_over_slots": spread([ratio * baseline.slots / measured.slots for ratio in times]),
        },
    }


def model_flops_utilisation(bench: Bench, measured: Measurement) -> float | None:
    """Return the MFU, computed with the formula that training uses; None if the device's peak is unknown."""
    module = bench.engines["next_token"].module
    throughput = Throughput(
        count_parameters(module.model, module.objective), bench.world.size, bench.config.data.sequence_length
    )
    for number, rows in enumerate(measured.rows):  # targets and time are totals of all passes
        throughput.add(
            rows, 0 if number else measured.targets, 0.0 if number else statistics.median(measured.seconds.values())
        )
    return throughput.take().get("throughput/mfu")


def time_ratios(measured: Measurement, other: Measurement) -> list[float]:
    """Return the time of one arm divided by the time of another arm in each round."""
    return [seconds / other.seconds[number] for number, seconds in measured.seconds.items()]


def spread(values: Collection[float]) -> dict[str, float]:
    """Return the median, minimum and maximum over the rounds."""
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def check_target(value: float, *, most: float = float("inf"), least: float = 0.0) -> dict[str, Any]:
    """Return a measured value, its limit, and whether the value meets the limit."""
    return {
        "measured": value,
        **({"at_most": most} if least == 0 else {"at_least": least}),
        "met": least <= value <= most,
    }
