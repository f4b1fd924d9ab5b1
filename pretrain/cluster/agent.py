"""The agent that runs on each node: `python -m pretrain.cluster.agent`.

It answers JSON requests, one per line, on standard input until standard input closes. It imports little, because every
diagnosis waits for the agents to start.
"""

import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from pretrain.cluster import facts, network, sharing
from pretrain.cluster.ranks import run_all_reduce

IDLE_SECONDS = 600.0
"""Time without a request after which the agent exits, in seconds. A lost connection is not always reported."""


def _environment(values: dict[str, str], names: list[str]) -> dict[str, str]:
    """Set variables like a launcher exports them, and return the values of the `names` that are set now."""
    os.environ.update(values)
    return {name: os.environ[name] for name in names if name in os.environ}


CALLS: dict[str, Callable[..., Any]] = {
    "environment": _environment,
    "time": time.time,
    "fact": lambda topic, settings: facts.TOPICS[topic](**settings),
    "write_marker": sharing.write_marker,
    "visible_markers": sharing.visible_markers,
    "remove_markers": sharing.remove_markers,
    "serve": network.serve,
    "hold_port": network.hold_port,
    "release_port": network.release_port,
    "connect": network.connect,
    "measure": network.measure,
    "all_reduce": run_all_reduce,
}


def main() -> None:
    """Answer requests in order until standard input closes.

    A separate thread answers them. The main thread only reads, and therefore notices at once when the caller is gone.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output goes to standard error and does not mix with the answers
    unread, available = b"", threading.Semaphore(0)
    requests: list[dict[str, Any]] = []

    def work() -> None:
        while available.acquire():
            request = requests.pop(0)
            try:
                result = CALLS[request["call"]](**request["arguments"])
            except Exception as error:  # the agent must continue to answer after one check fails
                result = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps({"id": request["id"], "result": result}) + "\n")
            answers.flush()

    threading.Thread(target=work, daemon=True).start()
    while select.select([0], [], [], IDLE_SECONDS)[0]:
        read = os.read(0, 1 << 16)
        if not read:
            break
        *lines, unread = (unread + read).split(b"\n")
        for line in lines:
            requests.append(json.loads(line))
            available.release()
    sys.stderr.flush()
    os._exit(0)  # the ranks of an all-reduce exit too when their standard input closes


if __name__ == "__main__":
    main()
