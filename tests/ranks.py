"""Start ranks on this machine as DeepSpeed's launcher does, but as forks of this process: `ranks.py N SCRIPT [ARGUMENT ...]`.

In the warm process (tests/warm_process.py) no rank then has anything to import. When a rank fails, the others get SIGTERM at once and SIGKILL
after 30 seconds, and the exit code is that of the failure, as with DeepSpeed's launcher. Unlike that one, which kills the ranks 30 seconds
after it has passed a signal on to them, this one then waits for them, however slow the machine is.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys

from tests import warm_process

GRACE = 30
"""Seconds that the other ranks have after the first one has failed."""
PR_SET_NAME = 15


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork_ranks(count: int) -> list[int]:
    """Return the processes of the ranks; in a rank, an empty list."""
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ.update(common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            warm_process.draw_seeds()
            ctypes.CDLL(None).prctl(PR_SET_NAME, f"rank {rank}".encode(), 0, 0, 0)  # by which tests find it
            return []
        ranks.append(pid)
    return ranks


def wait_for(ranks: list[int]) -> int:
    """Pass signals on to the ranks until all have ended; return the first exit code that is not 0, or 0."""
    living, first = set(ranks), 0

    def pass_on(number: int, frame: object = None) -> None:
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if number == signal.SIGALRM else number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, pass_on)
    while living:
        pid, status = os.wait()
        living.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not first:
            first = code if code > 0 else 1
            pass_on(signal.SIGTERM)
            signal.alarm(GRACE)
    return first


def main() -> None:
    count, script, *arguments = sys.argv[1:]
    ranks = fork_ranks(int(count))
    if ranks:
        sys.exit(wait_for(ranks))
    warm_process.run([script, f"--local_rank={os.environ['LOCAL_RANK']}", *arguments])


if __name__ == "__main__":
    main()
