"""A launcher that forks the ranks from its own process: `ranks.py N SCRIPT [ARGUMENT ...]`.

In the warm process (tests/warm_process.py), the ranks do not have to import anything. If a rank fails, its peers get
SIGTERM immediately and SIGKILL after 30 seconds, and the launcher exits with the exit code of the failed rank, or 1 if
a signal ended it. DeepSpeed's launcher behaves in the same way, with one difference: after a signal, it kills the ranks
30 seconds later. This launcher forwards the signal, and its 30 seconds start when the first rank fails.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys

from tests import warm_process

GRACE = 30
"""Time after the first failure of a rank until its peers are killed, in seconds."""
PR_SET_NAME = 15


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork_ranks(count: int) -> list[int]:
    """Fork the ranks, and return their process ids. In a rank, return an empty list."""
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
            ctypes.CDLL(None).prctl(PR_SET_NAME, f"rank {rank}".encode(), 0, 0, 0)  # tests find the rank by this name
            return []
        ranks.append(pid)
    return ranks


def wait_for(ranks: list[int]) -> int:
    """Forward signals to the ranks until all have exited.

    Return the exit code of the first rank that failed (1 if a signal ended it), or 0.
    """
    living = set(ranks)
    first_failure = 0

    def forward(number: int, frame: object = None) -> None:
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if number == signal.SIGALRM else number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, forward)
    while living:
        pid, status = os.wait()
        living.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not first_failure:
            first_failure = code if code > 0 else 1
            forward(signal.SIGTERM)
            signal.alarm(GRACE)
    return first_failure


def main() -> None:
    count, script, *arguments = sys.argv[1:]
    ranks = fork_ranks(int(count))
    if ranks:
        sys.exit(wait_for(ranks))
    warm_process.run([script, f"--local_rank={os.environ['LOCAL_RANK']}", *arguments])


if __name__ == "__main__":
    main()
