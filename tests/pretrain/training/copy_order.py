"""Train and print, in order, when a checkpoint is copied, when the run waits for the copies, and its optimizer steps: `copy_order.py CONFIG`."""

import sys

from pretrain.config import load_config
from pretrain.training import saving
from pretrain.training.distributed import init_world
from pretrain.training.host_copies import HostCopies
from pretrain.training.setup import set_up


class Told(HostCopies):
    """Says what is asked of it."""

    def begin(self) -> None:
        print("event begin", flush=True)
        super().begin()

    def copy(self, value):
        print("event copy", flush=True)
        return super().copy(value)

    def before_change(self) -> None:
        print("event before_change", flush=True)
        super().before_change()

    def wait(self) -> None:
        print("event wait", flush=True)
        super().wait()


saving.HostCopies = Told
trainer = set_up(load_config(sys.argv[1]), init_world())
assert trainer is not None
trainer.engine.optimizer.optimizer.register_step_pre_hook(lambda *_: print("event update", flush=True))
trainer.train()
