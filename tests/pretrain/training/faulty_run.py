"""A run in which something goes wrong, or that waits for the test: `faulty_run.py WHAT CONFIG`.

none          nothing
spike:S       the loss of step S is a hundred times itself, in whatever process computes it
hold:S,...    it waits at the beginning of each of these steps, see pause_points.py
validation:S  it waits in the validation of step S for a signal
save:S        it waits within the save of step S
convert:0     it converts a checkpoint for ever
robin:0       it converts checkpoints of round robin gradients, which DeepSpeed then loads wrongly
grace:0       launchers wait no time before they kill its ranks
crash:0       it raises an error before it has a trainer
bus:S         rank 0 reads a mapped file behind its end in step S
truncate:S    the shards are cut in half before the rows of step S are read
hang:S        rank 0 waits for ever in step S
fail:S        rank 0 raises an error in step S
abort:S       a library of C on rank 0 prints and aborts the process in step S

Several are joined by +.
"""

import ctypes
import itertools
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from pretrain.data import prefetch
from pretrain.training import checkpoint, loop, setup
from pretrain.training.main import main
from tests.pretrain.training.pause_points import hold_save, hold_steps, hold_validation

place = next(place for place, word in enumerate(sys.argv) if place and not word.startswith("--"))
parts = dict((part.split(":") + ["0"])[:2] for part in sys.argv.pop(place).split("+"))

if "spike" in parts:

    class Spoiled(loop.Trainer):
        def _agree(self, sums, divisors, data_failed):
            sums = {
                name: value * torch.tensor(100.0 if self.progress.step == int(parts["spike"]) else 1.0)
                for name, value in sums.items()
            }
            return super()._agree(sums, divisors, data_failed)

    setup.Trainer = Spoiled

if "hold" in parts:
    hold_steps(Path(sys.argv[-1]), list(map(int, parts["hold"].split(","))))
if "validation" in parts:
    hold_validation(int(parts["validation"]))
if "save" in parts:
    hold_save(int(parts["save"]))
if "truncate" in parts:
    make, made = prefetch.Prefetch._make, itertools.count(1)

    def cut(self):
        if next(made) == int(parts["truncate"]):
            for shard in self._loader.corpus.folder.glob("train-*.arrow"):
                os.truncate(shard, shard.stat().st_size // 2)
        return make(self)

    prefetch.Prefetch._make = cut

if {"hang", "fail", "abort", "bus"} & set(parts):
    count = loop.Trainer._count

    def failing(self, rows):
        count(self, rows)
        self._moved()
        if self.world.is_main and self.progress.step == int(parts.get("hang", 0)):
            threading.Event().wait()
        if self.world.is_main and self.progress.step == int(parts.get("fail", 0)):
            raise RuntimeError("made to fail")
        if self.world.is_main and self.progress.step == int(parts.get("abort", 0)):
            ctypes.CDLL(None).perror(b"a library aborts")
            ctypes.CDLL(None).abort()
        if self.world.is_main and self.progress.step == int(parts.get("bus", 0)):
            os.kill(os.getpid(), signal.SIGBUS)

    loop.Trainer._count = failing

if "convert" in parts:
    checkpoint.CONVERTER = [
        "-c",
        "import os, sys, time; os.makedirs(sys.argv[4]); print('converting', flush=True); time.sleep(9999)",
    ]
if "robin" in parts:
    make_universal = checkpoint.make_universal
    checkpoint.make_universal = lambda found, world, stop, say, round_robin=False: make_universal(
        found, world, stop, say
    )
if "grace" in parts:
    loop.LAUNCHER_GRACE = 0.0
if "crash" in parts:

    def crash(*arguments):
        raise RuntimeError("a bug")

    setup.Corpus = crash

main()
