"""The GPU of a rank."""

import os
from collections.abc import Mapping

import torch

from data_prep.console import UserError

LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
"""Variables in which torchrun, DeepSpeed and Open MPI tell how many ranks are on a machine."""


def gpu_index(environment: Mapping[str, str], visible: int) -> int:
    """Return the index of a rank's GPU among the `visible` ones: 0 if it sees only one, else its LOCAL_RANK.

    Raises UserError if the machine has several GPUs but more ranks than that; on all of its ranks, if the launcher says how many there are.
    """
    if visible == 1:
        return 0
    local_rank = int(environment["LOCAL_RANK"])
    ranks = max([local_rank + 1, *(int(environment[name]) for name in LOCAL_SIZES if name in environment)])
    if ranks > visible:
        raise UserError(
            f"{ranks} ranks on a machine with {visible} GPUs: start at most as many ranks on it as it has GPUs"
        )
    return local_rank


def select_gpu() -> int:
    """Make the GPU of this rank the current device, tell it to DeepSpeed, which reads LOCAL_RANK, and return its index. Raises UserError."""
    index = gpu_index(os.environ, torch.cuda.device_count())
    os.environ["LOCAL_RANK"] = str(index)
    torch.cuda.set_device(index)
    return index
