"""A run in which something goes wrong: `spoiled_run.py WHAT CONFIG`.

spike:S     the loss of step S is a hundred times itself, in whatever process computes it
slow        validation takes a second a batch
"""

import sys
import time

import torch

from pretrain.training import loop
from pretrain.training.main import main
from pretrain.training.validation import Validation

place = next(place for place, word in enumerate(sys.argv) if place and not word.startswith("--"))
what, number = (sys.argv.pop(place).split(":") + ["0"])[:2]

if what == "spike":
    class Spoiled(loop.Trainer):
        def _agree(self, sums, divisors, data_failed):
            sums = {name: value * torch.tensor(100.0 if self.progress.step == int(number) else 1.0) for name, value in sums.items()}
            return super()._agree(sums, divisors, data_failed)

    import pretrain.training.setup
    pretrain.training.setup.Trainer = Spoiled

if what == "slow":
    whole = Validation.run

    def run(self, engine, units, stop=lambda: False):
        def slowly() -> bool:
            print("a batch of validation", flush=True)
            time.sleep(1)
            return stop()
        return whole(self, engine, units, slowly)

    Validation.run = run

main()
