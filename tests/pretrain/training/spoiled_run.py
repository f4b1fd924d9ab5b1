"""A run in which something goes wrong, or that waits for the test: `spoiled_run.py WHAT CONFIG`.

none          nothing
spike:S       the loss of step S is a hundred times itself, in whatever process computes it
hold:S,...    it waits at the beginning of each of these steps, see holding.py
validation:S  it waits in the validation of step S for a signal
save:S        it waits within the save of step S
"""

import sys
from pathlib import Path

import torch

from pretrain.training import loop
from pretrain.training.main import main
from tests.pretrain.training.holding import hold_save, hold_steps, hold_validation

place = next(place for place, word in enumerate(sys.argv) if place and not word.startswith("--"))
what, number = (sys.argv.pop(place).split(":") + ["0"])[:2]

if what == "spike":
    class Spoiled(loop.Trainer):
        def _agree(self, sums, divisors, data_failed):
            sums = {name: value * torch.tensor(100.0 if self.progress.step == int(number) else 1.0) for name, value in sums.items()}
            return super()._agree(sums, divisors, data_failed)

    import pretrain.training.setup
    pretrain.training.setup.Trainer = Spoiled

if what == "hold":
    hold_steps(Path(sys.argv[-1]), list(map(int, number.split(","))))
if what == "validation":
    hold_validation(int(number))
if what == "save":
    hold_save(int(number))

main()
