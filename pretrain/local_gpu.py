"""The GPU of a rank."""

import os

import torch

from data_prep.console import UserError


def gpu_index(local_rank: int, visible: int) -> int:
    """Return the index of a rank's GPU among the `visible` ones: the local rank, or 0 where the launcher shows each rank its own GPU alone.

    Raises UserError where there are fewer GPUs than ranks.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(f"the rank with LOCAL_RANK={local_rank} sees {visible} GPUs: start at most as many ranks on a node as it has GPUs")
    return local_rank


def select_gpu() -> int:
    """Make the GPU of this rank the current device, tell it to DeepSpeed, which reads LOCAL_RANK, and return its index. Raises UserError."""
    index = gpu_index(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count())
    os.environ["LOCAL_RANK"] = str(index)
    torch.cuda.set_device(index)
    return index
