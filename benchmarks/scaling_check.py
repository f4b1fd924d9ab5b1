"""Comparison of scaling_model.py with measurements on this machine: 1 and 2 CPU processes of one thread each."""

import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from scaling_model import Cluster, Link, Work, estimate_work, fit_link, step_seconds

ROOT = Path(__file__).parent.parent
STEPS = 14
"""Number of steps of a run."""
WARMUP_STEPS = 4
"""Number of initial steps that are not timed."""
SIZES = [1 << power for power in range(12, 27, 2)]
REPEATS = 9
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


def check(steps: int = STEPS, shape: dict[str, Any] = SHAPE) -> dict[str, Any]:
    """Measure a step on one process and on two processes, and predict the step on two from the step on one.

    One process is measured alone, and also while a second process trains next to it.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configs = {
            run: _config(folder, run, steps, ranks, shape)
            for run, ranks in (("alone", 1), ("beside", 1), ("besides", 1), ("two", 2))
        }
        _call([sys.executable, "-m", "data_prep", str(configs["alone"])])
        links = collectives()
        alone = _steps(folder, [_start(configs["alone"], 1)], ["alone"])
        beside = _steps(folder, [_start(configs[run], 1) for run in ("beside", "besides")], ["beside", "besides"])
        two = _steps(folder, [_start(configs["two"], 2)], ["two"])
        plan = _plan(configs["two"])
    gathering, reducing = links["all_gather"], links["reduce_scatter"]
    work = estimate_work(plan, 1.0, 1)
    predicted = {}
    for source, seconds in (("from one process alone", alone), ("from one process beside another", beside)):
        measured = Work(**(vars(work) | {"compute_seconds": seconds}))
        # The model has one link for all collectives, but gloo's collectives differ in speed.
        gather_seconds, reduce_seconds = [
            step_seconds(measured, 3, 2, Cluster(link, None, 2), 0.0)["communication_seconds"]
            for link in (gathering, reducing)
        ]
        communication = (2 * gather_seconds + reduce_seconds) / 3
        predicted[source] = {
            "compute_seconds": seconds,
            "communication_seconds": communication,
            "seconds": seconds + communication,
            "predicted_over_measured": (seconds + communication) / two,
        }
    return {
        "parameters": plan.parameters.total,
        "positions_of_a_micro_step": work.tokens,
        "threads_of_a_rank": 1,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": round(load, 2),
        "links": {name: vars(link) for name, link in links.items()},
        "measured_step_seconds": {"1 process": alone, "1 process beside another": beside, "2 processes, ZeRO-3": two},
        "predicted_2_processes": predicted,
    }


def _config(folder: Path, name: str, steps: int, ranks: int, shape: dict[str, Any]) -> Path:
    """Write the configuration of a run with 4 rows of 128 positions per rank and step, and return its path."""
    path = folder / f"{name}.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": name,
                "seed": 1,
                "output_dir": str(folder),
                "data": {
                    "path": str(folder / "corpus"),
                    "sequence_length": 128,
                    "tokenizer": {"vocab_size": 512},
                    "workers": 1,
                    "deduplicate": "none",
                    "sources": [{"type": "nlrx", "records": 4000}],
                },
                "model": {"family": "llama", "shape": shape},
                "objective": {"name": "next_token"},
                "train": {"steps": steps, "learning_rate": 1e-4, "global_batch_rows": 4 * ranks, "micro_batch_rows": 4},
                "checkpoint": {"every": 10 * steps},
                "monitor": {"log_every": 1, "validate_every": 10 * steps, "loggers": []},
            }
        )
    )
    return path


def _start(config: Path, ranks: int) -> subprocess.Popen:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    launcher = [
        str(Path(sys.executable).parent / "torchrun"),
        "--nproc-per-node",
        str(ranks),
        "--master-port",
        str(port),
    ]
    return subprocess.Popen(
        [*(launcher if ranks > 1 else [sys.executable]), "launcher/run.py", str(config)],
        cwd=ROOT,
        env=_environment(),
        stdout=sys.stderr,
    )


def _steps(folder: Path, running: list[subprocess.Popen], names: list[str]) -> float:
    """Return the median duration of the steps of runs that are training at the same time, in seconds."""
    if any([process.wait() for process in running]):
        raise RuntimeError(f"a run of {names} failed: see its output above")
    durations = []
    for name in names:
        seconds = [json.loads(line)["seconds"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        durations += [
            after - before for before, after in zip(seconds[WARMUP_STEPS - 1 : -1], seconds[WARMUP_STEPS:], strict=True)
        ]
    return statistics.median(durations)


def _plan(config: Path) -> Any:
    from pretrain.config import load_config
    from pretrain.training.dry_run import checked_plan

    return checked_plan(load_config(config), 2)


def _call(command: list[str]) -> None:
    subprocess.run(command, cwd=ROOT, env=_environment(), stdout=sys.stderr, check=True)


def _environment() -> dict[str, str]:
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def collectives() -> dict[str, Link]:
    """Return the links between two processes of this machine, as measured with all_gather and reduce_scatter."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(rank, port, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    times = results.get(timeout=300)
    for process in ranks:
        process.join()
    return {name: fit_link(collective_times, 2) for name, collective_times in times.items()}


def _rank(rank: int, port: int, results: Any) -> None:
    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    times: dict[str, list[tuple[float, float]]] = {"all_gather": [], "reduce_scatter": []}
    for size in SIZES:
        whole, part = torch.ones(size // 4), torch.ones(size // 8)
        calls = {
            "all_gather": partial(dist.all_gather_into_tensor, whole, part),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, part, whole),
        }
        for name, call in calls.items():
            seconds = []
            for _ in range(REPEATS):
                dist.barrier()
                started = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - started)
            times[name].append((size, statistics.median(seconds[1:])))
    if rank == 0:
        results.put(times)
    dist.barrier()
    dist.destroy_process_group()
