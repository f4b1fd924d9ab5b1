"""Which processes mpirun or srun has started together with this one."""

import os
from typing import Any

from data_prep.console import UserError


def launched_process_count() -> int:
    """How many they are; 1 without mpirun and srun, or where PMIx does not tell."""
    sizes = [
        os.environ[name] for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS") if name in os.environ
    ]
    return max([int(size) for size in sizes if size.isdecimal()], default=1)


def is_silent_rank() -> bool:
    """Where several processes were started, all meet the same mistake; the first one on each node reports it."""
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
    return any(os.environ.get(name) not in (None, "", "0") for name in names)


def find_mpi() -> Any | None:
    """MPI's communicator of these processes; None for a single one. Raises UserError where it does not hold them all."""
    expected = launched_process_count()
    if expected == 1 and "PMIX_RANK" not in os.environ:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started by mpirun or srun, but mpi4py finds no MPI library ({' '.join(str(error).split())}); "
            "install one, such as the package mpich: pip install 'jepa-pretrain[mpi]'"
        ) from None
    size = MPI.COMM_WORLD.Get_size()
    if size < expected:
        raise UserError(
            f"{expected} processes were started together, but MPI sees {size}: its library is not that of the launcher; "
            "start with the mpirun of the library, or with srun --mpi=pmi2 or --mpi=pmix"
        )
    return MPI.COMM_WORLD if size > 1 else None
