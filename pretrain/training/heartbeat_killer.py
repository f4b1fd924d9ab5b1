"""Started beside each rank: ends it when it has shown no sign of life for too long, which it cannot do itself while it is stopped.

Without it a launcher would wait for such a rank for ever. `python heartbeat_killer.py PID`: each line on standard input is a sign of life, and
says for how many seconds none may follow. Standard library only: it starts at once and takes little memory.
"""

import contextlib
import os
import select
import signal
import sys

MORE = 5.0
"""Seconds that a rank has beyond those: after a pause of the whole machine this process may run before it."""


def main() -> None:
    """Wait for heartbeats; kill the rank if they stop."""
    rank, seconds = int(sys.argv[1]), None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # those are for the rank, and this ends with it
    while select.select([0], [], [], seconds)[0] or select.select([0], [], [], MORE)[0]:
        lines = os.read(0, 1 << 16)
        if not lines:
            return
        seconds = float(lines.split()[-1])
    if os.getppid() == rank:
        with contextlib.suppress(OSError):  # nobody reads it, or the disk is full
            print(
                f"error: process {rank} has sent no heartbeat for {seconds:.0f} s; killing it",
                file=sys.stderr,
                flush=True,
            )
        os.kill(rank, signal.SIGKILL)


if __name__ == "__main__":
    main()
