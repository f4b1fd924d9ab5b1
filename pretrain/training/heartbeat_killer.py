"""A process next to each rank that kills the rank if its heartbeats stop.

A stopped rank cannot end itself, and a launcher would wait for it forever. `python heartbeat_killer.py PID` reads the
heartbeats of the rank PID from standard input. Each line is a heartbeat, and contains the number of seconds within
which the next heartbeat must follow. The process uses the standard library only, so it starts quickly and needs little
memory.
"""

import contextlib
import os
import select
import signal
import sys

EXTRA_SECONDS = 5.0
"""Additional time for a heartbeat, in seconds. After a pause of the whole machine, this process may run before the
rank."""


def main() -> None:
    """Wait for heartbeats; kill the rank if they stop."""
    rank_pid = int(sys.argv[1])
    seconds = None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the rank handles these signals, and this process ends with it
    while select.select([0], [], [], seconds)[0] or select.select([0], [], [], EXTRA_SECONDS)[0]:
        lines = os.read(0, 1 << 16)
        if not lines:
            return
        seconds = float(lines.split()[-1])
    if os.getppid() == rank_pid:
        with contextlib.suppress(OSError):  # the output is closed, or the disk is full
            print(
                f"error: process {rank_pid} has sent no heartbeat for {seconds:.0f} s; killing it",
                file=sys.stderr,
                flush=True,
            )
        os.kill(rank_pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
