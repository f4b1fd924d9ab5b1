"""Ranks that wait as in a collective that never returns, while rank 1 dies or ends: `waiting_ranks.py killed|ended`.

The others end with exit code 0 after 30 beats, if no watchdog ends them before.
"""

import os
import signal
import sys
import time

from pretrain.training import watchdog
from pretrain.training.distributed import init_world

watchdog.BEAT = 0.5
world = init_world()
assert world.notes is not None
watch = watchdog.Watchdog(world.notes, world.rank, world.hosts, 20.0, lambda line: print(f"rank {world.rank}: {line}", flush=True))
watch.moved(7)
watch.started()
time.sleep(4 * watchdog.BEAT)
if world.rank == 1 and sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if world.rank == 1:
    watch.close(ended=True)
    os._exit(0)
time.sleep((30 if sys.argv[1] == "ended" else 600) * watchdog.BEAT)
os._exit(0)
