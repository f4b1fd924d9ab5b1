"""An all-reduce over all ranks, like in training.

The agent of a node starts the ranks of that node. Each rank is a process `python -m pretrain.cluster.ranks`.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import Any

SMALL_SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 28)
"""Sizes that are measured in addition to the bucket if they are smaller than the bucket, in bytes."""
REPEATS = 8
"""Maximum number of timed repetitions of an all-reduce, after the first one."""
BF16_COUNTS = 256
"""Largest number n for which a sum of n ones is exact in bf16."""
REPEAT_BELOW_SECONDS = 1.0
"""Duration from which an all-reduce is not repeated, in seconds."""
MAX_EXPECTED_SECONDS = 20.0
"""Expected duration above which a size is skipped, in seconds."""


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
    """Start the ranks of this node, and wait until they exit or `seconds` have passed.

    `world` is the number of ranks on all nodes. The ranks connect at `address` and `port`. `bucket` is the size of the
    largest all-reduce, in bytes. Returns `errors`, the messages by rank, and `measured`, the
    measurements of rank 0.
    """
    processes: list[subprocess.Popen] = []
    rank_input, pipe_end = os.pipe()  # the pipe closes when this process exits, even if it is killed
    for local_rank, rank in enumerate(ranks):
        values = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(local_rank),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        settings = {
            "bucket": bucket,
            "precision": precision,
            "cuda": cuda,
            "init_timeout": seconds / 2,
        }
        command = [sys.executable, "-m", "pretrain.cluster.ranks", json.dumps(settings)]
        processes.append(
            subprocess.Popen(
                command,
                env=os.environ | values,
                stdin=rank_input,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        )
    os.close(rank_input)
    errors: dict[int, str] = {}
    measured: list[dict[str, Any]] = []
    deadline = time.monotonic() + seconds
    for rank, process in zip(ranks, processes, strict=True):
        try:
            output, error_output = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            errors[rank] = f"not finished within {seconds:.0f} s"
            continue
        if process.returncode:
            errors[rank] = _last_line(error_output) or f"exit code {process.returncode}"
        elif rank == 0:
            measured = json.loads(output.splitlines()[-1])
    os.close(pipe_end)
    return {"errors": errors, "measured": measured}


def main() -> None:
    """Run as one rank: measure all sizes, and let rank 0 print the measurements as JSON."""
    threading.Thread(target=_exit_when_input_closes, daemon=True).start()
    settings = json.loads(sys.argv[1])
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if settings["cuda"]:
        from pretrain.local_gpu import select_gpu

        device = torch.device("cuda", select_gpu())
    dist.init_process_group("nccl" if settings["cuda"] else "gloo", timeout=timedelta(seconds=settings["init_timeout"]))
    dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    sizes = sorted({size for size in SMALL_SIZES if size < settings["bucket"]} | {settings["bucket"]})
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
    os._exit(0)  # gloo's destructor can abort the process if a peer has already exited


def _time(elements: Any, before: list[dict[str, Any]]) -> float | None:
    """Return the median duration of an all-reduce of the tensor in seconds, the same on all ranks.

    Returns None if it would probably take longer than MAX_EXPECTED_SECONDS. `before` contains the measurements of
    smaller sizes.
    Raises RuntimeError if the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    expected_seconds = before[-1]["seconds"] * elements.nbytes / before[-1]["bytes"] if before else 0.0
    if expected_seconds > MAX_EXPECTED_SECONDS:
        return None
    times: list[float] = []
    while not times or (len(times) <= REPEATS and times[-1] < REPEAT_BELOW_SECONDS):
        elements.fill_(1.0)
        if elements.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        dist.all_reduce(elements)
        if elements.is_cuda:
            torch.cuda.synchronize()
        slowest = torch.tensor(time.perf_counter() - started, device=elements.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)  # all ranks must repeat the same number of times
        times.append(slowest.item())
        world = dist.get_world_size()
        counted = torch.ones(1, device=elements.device)
        dist.all_reduce(counted)
        exact = elements.dtype == torch.float32 or world <= BF16_COUNTS
        if counted.item() != world or (exact and any(elements[index].item() != world for index in (0, -1))):
            raise RuntimeError(
                f"an all-reduce of ones over {world} ranks returned "
                f"{counted.item()}, {elements[0].item()} and {elements[-1].item()}"
            )
    return statistics.median(times[1:] or times)  # the first duration includes setting up connections


def _exit_when_input_closes() -> None:
    """Exit when the agent has exited, because nothing waits for this rank any more."""
    sys.stdin.read()
    os._exit(1)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return (errors or lines or [""])[-1][:300]


if __name__ == "__main__":
    main()
