"""An all-reduce over all ranks, as training does one: an agent starts the ranks of its node, which are `python -m pretrain.cluster.ranks`."""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import Any

SMALL = (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 28)
"""Bytes that are reduced beside the bucket, as far as they are smaller."""
REPEATS = 8
BF16_COUNTS = 256
"""Up to here bf16 adds up ones exactly."""
SLOW = 1.0
"""Seconds from which on one time is enough."""
LONGEST = 20.0
"""Seconds that a larger size may be expected to take; else it is left out."""


def run_all_reduce(
    ranks: range | list[int],
    world: int,
    address: str,
    port: int,
    bucket: int,
    precision: str,
    cuda: bool,
    seconds: float,
) -> dict[str, Any]:
    """Start these ranks, of `world` in all, which meet at address:port, and wait for them; `errors` by rank, and the measurements of rank 0."""
    processes: list[subprocess.Popen] = []
    alive, hold = os.pipe()  # closes with this process, however it ends
    for place, rank in enumerate(ranks):
        values = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(place),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        settings = {
            "bucket": bucket,
            "precision": precision,
            "cuda": cuda,
            "meeting": seconds / 2,
        }  # for imports, the meeting, a collective
        command = [sys.executable, "-m", "pretrain.cluster.ranks", json.dumps(settings)]
        processes.append(
            subprocess.Popen(
                command,
                env=os.environ | values,
                stdin=alive,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        )
    os.close(alive)
    errors: dict[int, str] = {}
    measured: list[dict[str, Any]] = []
    deadline = time.monotonic() + seconds
    for rank, process in zip(ranks, processes, strict=True):
        try:
            output, said = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            errors[rank] = f"not through within {seconds:.0f} s"
            continue
        if process.returncode:
            errors[rank] = _last_line(said) or f"exit code {process.returncode}"
        elif rank == 0:
            measured = json.loads(output.splitlines()[-1])
    os.close(hold)
    return {"errors": errors, "measured": measured}


def main() -> None:
    """Be one rank."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    settings = json.loads(sys.argv[1])
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if settings["cuda"]:
        from pretrain.local_gpu import select_gpu

        device = torch.device("cuda", select_gpu())
    dist.init_process_group("nccl" if settings["cuda"] else "gloo", timeout=timedelta(seconds=settings["meeting"]))
    dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    sizes = sorted({size for size in SMALL if size < settings["bucket"]} | {settings["bucket"]})
    measured: list[dict[str, Any]] = []
    for size in sizes:
        elements = torch.full((max(1, size // dtype.itemsize),), 1.0, dtype=dtype, device=device)
        seconds = _time(elements, measured)
        if seconds is None:
            break
        measured.append(
            {
                "bytes": elements.nbytes,
                "seconds": seconds,
                "ranks": world,
                "bus_bytes_per_second": 2 * (world - 1) / world * elements.nbytes / seconds,
            }
        )
    if rank == 0:
        print(json.dumps(measured), flush=True)
    dist.barrier()
    os._exit(0)  # tearing gloo down after a peer can abort the process


def _time(elements: Any, before: list[dict[str, Any]]) -> float | None:
    """Median seconds of an all-reduce of the tensor, the same on all ranks; None where it would take too long by those before."""
    import torch
    import torch.distributed as dist

    expected = before[-1]["seconds"] * elements.nbytes / before[-1]["bytes"] if before else 0.0
    if expected > LONGEST:
        return None
    times: list[float] = []
    while not times or (len(times) <= REPEATS and times[-1] < SLOW):
        elements.fill_(1.0)
        if elements.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        dist.all_reduce(elements)
        if elements.is_cuda:
            torch.cuda.synchronize()
        slowest = torch.tensor(time.perf_counter() - started, device=elements.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)  # so that all ranks go on alike
        times.append(slowest.item())
        world = dist.get_world_size()
        counted = torch.ones(1, device=elements.device)
        dist.all_reduce(counted)
        exact = elements.dtype == torch.float32 or world <= BF16_COUNTS
        if counted.item() != world or (exact and any(elements[place].item() != world for place in (0, -1))):
            raise RuntimeError(
                f"an all-reduce of ones over {world} ranks gave {counted.item()}, {elements[0].item()} and {elements[-1].item()}"
            )
    return statistics.median(times[1:] or times)  # the first one sets up connections


def _end_with_input() -> None:
    """Exit when the agent has gone: nobody waits for this rank any more."""
    sys.stdin.read()
    os._exit(1)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return (errors or lines or [""])[-1][:300]


if __name__ == "__main__":
    main()
