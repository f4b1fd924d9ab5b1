"""Train, and print events in order: `copy_order.py CONFIG`.

The events are the calls that copy a checkpoint, the waits for these copies, and the optimizer steps.
"""

import sys

from pretrain.config import load_config
from pretrain.training import saving
from pretrain.training.distributed import init_world
from pretrain.training.host_copies import HostCopies
from pretrain.training.setup import set_up


class PrintingHostCopies(HostCopies):
    """Host copies that print each call."""

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


saving.HostCopies = PrintingHostCopies
trainer = set_up(load_config(sys.argv[1]), init_world())
assert trainer is not None
trainer.engine.optimizer.optimizer.register_step_pre_hook(lambda *_: print("event update", flush=True))
trainer.train()
