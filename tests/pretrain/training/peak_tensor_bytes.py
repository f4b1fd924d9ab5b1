"""What model states really take: `peak_tensor_bytes.py CONFIG ...` trains each and prints, on rank 0, a JSON line of bytes.

`held` is the most that tensors hold before a forward pass, beside the gradients of the micro batch before; `in_step` the most inside the
optimizer step.
"""

import gc
import json
import sys

import torch

from pretrain.config import load_config
from pretrain.training.distributed import init_world
from pretrain.training.setup import set_up


def tensors() -> list[torch.Tensor]:
    """Every tensor there is, gradients and ZeRO-3's partitions too."""
    found = []
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            found += [thing, getattr(thing, "ds_tensor", None), thing.grad if thing.is_leaf else None]
    return [tensor for tensor in found if tensor is not None]


def storages(of: list[torch.Tensor]) -> dict[int, int]:
    """Bytes by address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in of}


class Watch:
    """The most bytes in tensors that came since it was made, by moment."""

    def __init__(self) -> None:
        self.earlier = tensors()  # kept, so that no address is given out again
        self.known = storages(self.earlier)
        self.most = {"held": 0, "in_step": 0}

    def measure(self, moment: str) -> None:
        gc.collect()
        new = {address: size for address, size in storages(tensors()).items() if address not in self.known}
        self.most[moment] = max(self.most[moment], sum(new.values()))


def main() -> None:
    world = init_world()
    for path in [word for word in sys.argv[1:] if not word.startswith("--local_rank")]:
        watch = Watch()
        trainer = set_up(load_config(path), world)
        trainer.engine.register_forward_pre_hook(lambda *_, watch=watch: watch.measure("held"))
        trainer.engine.optimizer.optimizer.register_step_pre_hook(lambda *_, watch=watch: watch.measure("in_step"))
        trainer.train()
        if world.is_main:
            print(json.dumps({"name": trainer.config.name} | watch.most), flush=True)


main()
