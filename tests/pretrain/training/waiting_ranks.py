"""Ranks that wait as if in a hanging collective: `waiting_ranks.py killed|ended|paused`.

The argument selects what happens to rank 1. Its peer ends with exit code 0 after 20 heartbeats
unless a watchdog ends it earlier; in the case `killed`, the peer would wait for 600 heartbeats.
"""

import os
import signal
import subprocess
import sys
import time

from pretrain.training import watchdog
from pretrain.training.distributed import init_world
from pretrain.training.hooks import StepReport

watchdog.HEARTBEAT_INTERVAL = 0.4
case = sys.argv[1]
world = init_world()
assert world.rank_store is not None
# a rank counts as dead after 25 missed heartbeats, or after the minimum of 10
seconds = 100.0 if case == "paused" else 20.0
watch = watchdog.Watchdog(
    world.rank_store, world.rank, world.hosts, seconds, lambda line: print(f"rank {world.rank}: {line}", flush=True)
)
watch.begin()
watch.report_progress(7)
watch.after_step(None, StepReport())
if world.rank == 1 and case == "killed":
    os.kill(os.getpid(), signal.SIGKILL)  # before its second heartbeat
if world.rank == 1 and case == "paused":
    subprocess.Popen(["sh", "-c", f"sleep {14 * watchdog.HEARTBEAT_INTERVAL}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
if world.rank == 1 and case == "ended":
    watch.close(ended=True)
    os._exit(0)
time.sleep((600 if case == "killed" else 20) * watchdog.HEARTBEAT_INTERVAL)
os._exit(0)
