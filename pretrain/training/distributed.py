"""Ranks: who this process is, and the few collectives that bookkeeping needs."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from data_prep.console import UserError

Result = TypeVar("Result")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""As long as the slowest start takes; what hangs later is found by watchdog.py."""


@dataclass(frozen=True)
class World:
    """All ranks of the run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None
    """Where the ranks leave each other notes outside of collectives; None for a single rank."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that prints and writes metrics."""
        return self.rank == 0

    def sum(self, scalars: list[torch.Tensor]) -> list[float]:
        """Add up the scalars of all ranks, in fp64, with one transfer to the host."""
        total = torch.stack([scalar.double() for scalar in scalars])
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(P, ...) of every rank -> (ranks * P, ...)."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over the ranks: (...) of every rank -> this rank's part of the flat sum, (ceil(numel / ranks),), zeros behind its end."""
        part = -(-tensor.numel() // self.size)
        flat = torch.nn.functional.pad(tensor.flatten(), (0, part * self.size - tensor.numel()))
        if self.size == 1:
            return flat
        mine = flat.new_empty(part)
        dist.reduce_scatter_tensor(mine, flat)
        return mine

    def gather_objects(self, value: Any) -> list[Any]:
        """A small Python value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def agree(self, action: Callable[[], Result]) -> Result:
        """Do something on every rank that may fail on some: all return, or all raise the first rank's UserError."""
        result, error = None, None
        try:
            result = action()
        except UserError as caught:
            error = str(caught)
        errors = [found for found in self.gather_objects(error) if found is not None]
        if errors:
            raise UserError(errors[0])
        return result  # type: ignore[return-value]


def init_world() -> World:
    """Join the ranks that the launcher started: deepspeed, torchrun, srun, or a single plain process."""
    _environment_from_slurm()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ["MASTER_PORT"] = "0"  # alone: any free port
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # an optional op that would be compiled for minutes at the first start
        _share_cores()
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    notes, backend = None, accelerator.communication_backend_name()
    try:
        if not dist.is_initialized():
            store, rank, size = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
            dist.init_process_group(backend, store=dist.PrefixStore("ranks", store), rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
            notes = dist.PrefixStore("notes", store) if size > 1 else None
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    except dist.DistNetworkError as error:
        raise UserError(f"the ranks cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]}); "
                        "if another job has that port, give the launcher another one: --master_port") from None
    return World(dist.get_rank(), dist.get_world_size(), torch.device(accelerator.current_device_name()), notes)


def _environment_from_slurm() -> None:
    """srun without MPI: take rank and rendezvous from Slurm's variables."""
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) < 2:
        return
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    if "MASTER_ADDR" not in os.environ and int(os.environ.get("SLURM_NNODES", 1)) > 1:
        nodes = subprocess.run(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True)
        os.environ["MASTER_ADDR"] = nodes.stdout.split()[0]
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 10000))


def _share_cores() -> None:
    """On CPU, give each rank of this node its part of the cores, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
