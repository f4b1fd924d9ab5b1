"""The GPU of a rank."""

import os
from collections.abc import Mapping

import torch

from data_prep.utils.console import UserError

LOCAL_SIZE_VARIABLES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
"""Variables in which torchrun, DeepSpeed and Open MPI store the number of ranks on a machine."""


def gpu_index(environment: Mapping[str, str], visible: int) -> int:
    """Return the index of a rank's GPU among the `visible` ones: 0 if there is only one, else its LOCAL_RANK.

    Raises UserError if the machine has several GPUs but more ranks than GPUs. If the launcher sets the number of local
    ranks, all ranks of the machine raise it.
    """
    if visible == 1:
        return 0
    local_rank = int(environment["LOCAL_RANK"])
    ranks = max([local_rank + 1, *(int(environment[name]) for name in LOCAL_SIZE_VARIABLES if name in environment)])
    if ranks > visible:
        raise UserError(f"{ranks} ranks on a machine with {visible} GPUs: start at most one rank per GPU")
    return local_rank


def select_gpu() -> int:
    """Make the GPU of this rank the current device and return its index. Raises UserError.

    DeepSpeed reads the index from LOCAL_RANK, so this sets that variable too.
    """
    index = gpu_index(os.environ, torch.cuda.device_count())
    os.environ["LOCAL_RANK"] = str(index)
    torch.cuda.set_device(index)
    return index
