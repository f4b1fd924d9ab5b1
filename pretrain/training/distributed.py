"""The ranks of a run: the identity of this process, and the few collectives that the project calls itself."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from data_prep.utils.console import UserError, show_only_errors
from data_prep.utils.launch_env import find_mpi, launched_process_count
from pretrain.local_gpu import select_gpu
from pretrain.training.rank_store import RankStore

Result = TypeVar("Result")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Timeout of collectives, long enough for the slowest startup. watchdog.py detects later hangs."""
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables with settings of torch's CUDA allocator, by current and former name; read when the first GPU is used."""
ALLOCATOR_SETTINGS = "expandable_segments:True,pinned_max_round_threshold_mb:64"
"""Settings of torch's CUDA allocator. They keep micro steps of different lengths from fragmenting GPU memory, and the
pinned memory of a checkpoint from being rounded up to a power of two."""
MPI_PORT = 29500
"""Rendezvous port of the ranks of mpirun, unless MASTER_PORT is set."""


class RendezvousError(UserError):
    """A failed rendezvous of the ranks; a restart may succeed."""


@dataclass(frozen=True)
class World:
    """All ranks of the run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    rank_store: RankStore | None = None
    """Key-value store for exchanging values outside of collectives; None for a single rank."""
    hosts: tuple[str, ...] = ()
    """Host name of each rank."""

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
        """Concatenate the tensors (P, ...) of all ranks to (ranks * P, ...)."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up the tensors (...) of all ranks and return this rank's part of the flat sum, (ceil(numel / ranks),).

        The flat sum is padded with zeros at its end.
        """
        part = -(-tensor.numel() // self.size)
        flat = torch.nn.functional.pad(tensor.flatten(), (0, part * self.size - tensor.numel()))
        if self.size == 1:
            return flat
        local = flat.new_empty(part)
        dist.reduce_scatter_tensor(local, flat)
        return local

    def gather_objects(self, value: Any) -> list[Any]:
        """Return a list of the small Python values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite a tensor on every rank with the values of the main rank."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def run_and_sync_errors(self, action: Callable[[], Result]) -> Result:
        """Run an action that may fail on some ranks, on all ranks together.

        If any rank raises a UserError, all ranks raise the error of the lowest failing rank. Otherwise return the
        result.
        """
        result = None
        error = None
        try:
            result = action()
        except UserError as caught:
            error = str(caught)
        errors = [message for message in self.gather_objects(error) if message is not None]
        if errors:
            raise UserError(errors[0])
        return result  # type: ignore[return-value]


def init_world() -> World:
    """Join the ranks that deepspeed, torchrun, mpirun or srun started, or set up a single process. Raises UserError."""
    normalize_launcher_env()
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # avoids compiling an optional op for minutes in the first run
    else:
        if not any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
            os.environ[ALLOCATOR_VARIABLES[0]] = ALLOCATOR_SETTINGS
        select_gpu()
    rank_store = None
    backend = accelerator.communication_backend_name()
    try:
        if not dist.is_initialized():
            store, rank, size = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
            dist.init_process_group(
                backend, store=dist.PrefixStore("ranks", store), rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT
            )
            rank_store = RankStore(dist.PrefixStore("notes", store)) if size > 1 else None
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    except dist.DistNetworkError as error:
        raise RendezvousError(
            f"the ranks cannot connect at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"({str(error).splitlines()[0]}); if another job uses that port, pass a different --master_port to the "
            "launcher"
        ) from None
    world = World(dist.get_rank(), dist.get_world_size(), torch.device(accelerator.current_device_name()), rank_store)
    if not world.is_main:
        show_only_errors()
    world = replace(world, hosts=tuple(world.gather_objects(socket.gethostname())))
    if world.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.hosts.count(world.hosts[world.rank])))
    return world


def normalize_launcher_env() -> None:
    """Set the variables that torch needs for its rendezvous from the variables of the launcher.

    Raises UserError if the launcher would start several separate runs.
    """
    started = launched_process_count()
    if "RANK" not in os.environ:
        if (
            started > 1
            and started == int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
            and "OMPI_COMM_WORLD_SIZE" not in os.environ
        ):
            _environment_from_slurm(started)
        elif find_mpi() is not None:
            _environment_from_mpi()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if int(os.environ["WORLD_SIZE"]) < started:
        raise UserError(
            f"mpirun or srun started {started} processes, and each would be a separate run with "
            f"{os.environ['WORLD_SIZE']} rank(s): start run.py directly under mpirun or srun, or start the other "
            "launcher only once for all nodes"
        )
    if os.environ["WORLD_SIZE"] == "1" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        os.environ["MASTER_PORT"] = "0"  # a single rank uses any free port


def _environment_from_slurm(tasks: int) -> None:
    """Set the variables of torch for srun without MPI."""
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
    }
    if "MASTER_ADDR" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) > 1:
        nodes = subprocess.run(
            ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]],
            capture_output=True,
            text=True,
            check=True,
        )
        os.environ["MASTER_ADDR"] = nodes.stdout.split()[0]
    os.environ.setdefault("MASTER_PORT", str(slurm_port()))


def slurm_port() -> int:
    """Return the rendezvous port of a Slurm job, used unless MASTER_PORT is set.

    Job steps have different ports, because they may share a node.
    """
    job, step = (int(os.environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 20000 + (7 * job + step) % 10000


def _environment_from_mpi() -> None:
    """Set the variables of torch for mpirun, or for srun with PMIx."""
    set_by_user = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    deepspeed.comm.mpi_discovery(distributed_port=MPI_PORT, verbose=False)
    os.environ |= set_by_user


def leave_group(code: int) -> None:
    """Exit the process with `code` if it is one of several ranks; for a single rank, only destroy the process group.

    gloo's threads can abort a process that is torn down after one of its peers, even while the group is being
    destroyed.
    """
    if not dist.is_initialized():
        return
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
        return
    if mpi := sys.modules.get("mpi4py.MPI"):
        mpi.Finalize()  # otherwise mpirun reports a failure
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
