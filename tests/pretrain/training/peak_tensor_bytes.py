"""Measure the memory of model states: `peak_tensor_bytes.py CONFIG ...`.

Train each configuration, and print a JSON line of bytes on rank 0. `held` is the peak of all tensors before a forward
pass, including the gradients of the previous micro batch. `in_step` is the peak at the optimizer step.
"""

import gc
import json
import sys

import torch

from pretrain.config import load_config
from pretrain.training.distributed import init_world
from pretrain.training.setup import set_up


def tensors() -> list[torch.Tensor]:
    """Return every tensor that exists, including gradients and the partitions of ZeRO-3."""
    values = []
    for value in gc.get_objects():
        if isinstance(value, torch.Tensor):
            values += [value, getattr(value, "ds_tensor", None), value.grad if value.is_leaf else None]
    return [tensor for tensor in values if tensor is not None]


def storages(members: list[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of each storage by its address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in members}


class PeakWatch:
    """Peak bytes of the tensors that were created after the watch, for each moment."""

    def __init__(self) -> None:
        self.earlier = tensors()  # kept alive: otherwise new tensors could reuse their addresses
        self.earlier_storages = storages(self.earlier)
        self.peak = {"held": 0, "in_step": 0}

    def measure(self, moment: str) -> None:
        gc.collect()
        new = {address: size for address, size in storages(tensors()).items() if address not in self.earlier_storages}
        self.peak[moment] = max(self.peak[moment], sum(new.values()))


def main() -> None:
    world = init_world()
    for path in [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]:
        watch = PeakWatch()
        trainer = set_up(load_config(path), world)
        trainer.engine.register_forward_pre_hook(lambda *_, watch=watch: watch.measure("held"))
        trainer.engine.optimizer.optimizer.register_step_pre_hook(lambda *_, watch=watch: watch.measure("in_step"))
        trainer.train()
        if world.is_main:
            print(json.dumps({"name": trainer.config.name} | watch.peak), flush=True)


main()
