"""What runs on each node: answers JSON lines on standard input until it closes. `python -m pretrain.cluster.agent`.

Light: starts in the time of a Python with few imports, so that a pair of nodes is asked in seconds.
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
"""Without a question: the other side is gone, and the network did not say so."""


def _environment(values: dict[str, str], asked: list[str]) -> dict[str, str]:
    """Take over variables, as a launcher exports them; return what is set now of those that are asked for."""
    os.environ.update(values)
    return {name: os.environ[name] for name in asked if name in os.environ}


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
    """Answer one question after another; what reads the questions notices at once that the other side has gone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else prints does not disturb the answers
    unread, questions = b"", threading.Semaphore(0)
    waiting: list[dict[str, Any]] = []

    def work() -> None:
        while questions.acquire():
            question = waiting.pop(0)
            try:
                result = CALLS[question["call"]](**question["arguments"])
            except Exception as error:  # the node must go on answering, whatever one check meets
                result = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps({"id": question["id"], "result": result}) + "\n")
            answers.flush()

    threading.Thread(target=work, daemon=True).start()
    while select.select([0], [], [], IDLE_SECONDS)[0]:
        read = os.read(0, 1 << 16)
        if not read:
            break
        *lines, unread = (unread + read).split(b"\n")
        for line in lines:
            waiting.append(json.loads(line))
            questions.release()
    sys.stderr.flush()
    os._exit(0)  # processes of an all-reduce see their input close, and end too


if __name__ == "__main__":
    main()
