"""The agent that runs on each node: `python -m pretrain.cluster.agent`.

It answers JSON requests, one per line, on standard input until standard input closes. This module imports little,
because every diagnosis waits for the agents to start.
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
    """Set the variables that a launcher would export, and return the values of those `names` that are now set."""
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

    A separate thread computes the answers. The main thread only reads, so it notices immediately when the caller exits.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output goes to standard error and does not mix with the answers
    unread = b""
    available = threading.Semaphore(0)
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
        received = os.read(0, 1 << 16)
        if not received:
            break
        *lines, unread = (unread + received).split(b"\n")
        for line in lines:
            requests.append(json.loads(line))
            available.release()
    sys.stderr.flush()
    os._exit(0)  # this also closes the standard input of all-reduce ranks, which then exit


if __name__ == "__main__":
    main()
