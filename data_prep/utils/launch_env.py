"""Detection of the processes that mpirun or srun has started together with this one."""

import os
from typing import Any

from data_prep.utils.console import UserError


def launched_process_count() -> int:
    """Return the number of processes; 1 without mpirun and srun, or if PMIx does not report it."""
    sizes = [
        os.environ[name] for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS") if name in os.environ
    ]
    return max([int(size) for size in sizes if size.isdecimal()], default=1)


def is_silent_rank() -> bool:
    """Return whether this process should not print errors, because it is not the first one of its node.

    All processes that were started together fail with the same error.
    """
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
    return any(os.environ.get(name) not in (None, "", "0") for name in names)


def find_mpi() -> Any | None:
    """Return the MPI communicator of all processes, or None for a single process.

    Raises UserError if there is no MPI library, or if the communicator does not include all processes.
    """
    expected = launched_process_count()
    if expected == 1 and "PMIX_RANK" not in os.environ:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started by mpirun or srun, but mpi4py finds no MPI library ({' '.join(str(error).split())}); "
            "install one, such as the package mpich: run pip install '.[mpi]' in the project's folder"
        ) from None
    size = MPI.COMM_WORLD.Get_size()
    if size < expected:
        raise UserError(
            f"{expected} processes were started together, but MPI sees {size}: the launcher belongs to a different MPI "
            "library; start with the mpirun of this library, or with srun --mpi=pmi2 or --mpi=pmix"
        )
    return MPI.COMM_WORLD if size > 1 else None
