"""Train with a fault, or wait for the test at a chosen point: `faulty_run.py FAULTS CONFIG`.

none          no fault
spike:S       the loss of step S is multiplied by 100, in every process that computes it
hold:S,...    the run waits at the beginning of each of these steps (see pause_points.py)
validation:S  the run waits in the validation of step S for a signal
save:S        the run waits during the save of step S
convert:0     the conversion of a checkpoint hangs
robin:0       checkpoints of round robin gradients are converted, which DeepSpeed then loads wrongly
grace:0       the run assumes that launchers kill its ranks without a grace period
crash:0       the run raises an error before the trainer exists
bus:S         rank 0 gets SIGBUS in step S, as after a read past the end of a mapped file
truncate:S    the shards are cut in half before the rows of step S are read
hang:S        rank 0 hangs in step S
fail:S        rank 0 raises an error in step S
full:S        the disk of rank 0 is full in step S
abort:S       a C library on rank 0 prints a message and aborts the process in step S

Several faults are joined by +.
"""

import ctypes
import errno
import itertools
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from pretrain.data import prefetch
from pretrain.training import checkpoint_loading, loop, setup, stop
from pretrain.training.main import main
from tests.pretrain.training.pause_points import hold_save, hold_steps, hold_validation

position = next(index for index, argument in enumerate(sys.argv) if index and not argument.startswith("--"))
faults = dict((fault.split(":") + ["0"])[:2] for fault in sys.argv.pop(position).split("+"))

if "spike" in faults:

    class SpikingTrainer(loop.Trainer):
        def _reach_consensus(self, sums, divisors, data_failed):
            sums = {
                name: value * torch.tensor(100.0 if self.progress.step == int(faults["spike"]) else 1.0)
                for name, value in sums.items()
            }
            return super()._reach_consensus(sums, divisors, data_failed)

    setup.Trainer = SpikingTrainer

if "hold" in faults:
    hold_steps(Path(sys.argv[-1]), list(map(int, faults["hold"].split(","))))
if "validation" in faults:
    hold_validation(int(faults["validation"]))
if "save" in faults:
    hold_save(int(faults["save"]))
if "truncate" in faults:
    original_make, calls = prefetch.Prefetch._make, itertools.count(1)

    def truncate_then_make(self):
        if next(calls) == int(faults["truncate"]):
            for shard in self._loader.corpus.folder.glob("train-*.arrow"):
                os.truncate(shard, shard.stat().st_size // 2)
        return original_make(self)

    prefetch.Prefetch._make = truncate_then_make

if {"hang", "fail", "full", "abort", "bus"} & set(faults):
    original_count = loop.Trainer._count

    def count_then_fail(self, rows):
        original_count(self, rows)
        self.report_progress()
        if self.world.is_main and self.progress.step == int(faults.get("hang", 0)):
            threading.Event().wait()
        if self.world.is_main and self.progress.step == int(faults.get("fail", 0)):
            raise RuntimeError("made to fail")
        if self.world.is_main and self.progress.step == int(faults.get("full", 0)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
        if self.world.is_main and self.progress.step == int(faults.get("abort", 0)):
            ctypes.CDLL(None).perror(b"a library aborts")
            ctypes.CDLL(None).abort()
        if self.world.is_main and self.progress.step == int(faults.get("bus", 0)):
            os.kill(os.getpid(), signal.SIGBUS)

    loop.Trainer._count = count_then_fail

if "convert" in faults:
    checkpoint_loading.CONVERTER = [
        "-c",
        "import os, sys, time; os.makedirs(sys.argv[4]); print('converting', flush=True); time.sleep(9999)",
    ]
if "robin" in faults:
    make_universal = checkpoint_loading.make_universal
    checkpoint_loading.make_universal = lambda found, world, stop, round_robin=False: make_universal(found, world, stop)
if "grace" in faults:
    stop.LAUNCHER_GRACE = 0.0
if "crash" in faults:

    def crash(*arguments):
        raise RuntimeError("a bug")

    setup.Corpus = crash

main()
