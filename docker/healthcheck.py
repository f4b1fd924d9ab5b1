"""Whether a container can do its work: exit code 0, or 1 with a line that says what is wrong.

The folder of the runs must be writable, sshd must answer where one was started, and the newest run, where it says `running`, must have written
something within the last hour. Needs nothing but Python, so that it takes no time from a run.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

SSHD_PORT = 2222
SILENT = 3600.0
"""Seconds. A run that hangs ends by itself within half an hour: one that is silent for longer was killed, or stopped as a whole."""


def problem(runs: Path, sshd_pid: Path) -> str | None:
    """Return what is wrong, in one line; None if nothing is."""
    if not os.access(runs, os.W_OK):
        return f"user {os.getuid()} cannot write to {runs}: mount a volume there that belongs to that user"
    if sshd_pid.exists():
        try:
            with socket.create_connection(("127.0.0.1", SSHD_PORT), timeout=5) as connection:
                connection.sendall(b"SSH-2.0-healthcheck\r\n")  # or sshd would complain in its log
                greeting = connection.recv(4)
        except OSError as error:
            return f"sshd does not answer: {error}"
        if greeting != b"SSH-":
            return "what answers on the port of sshd is something else"
    return _silence(runs)


def _silence(runs: Path) -> str | None:
    statuses = sorted(
        [*runs.glob("*/status.json"), *runs.glob("*/*/status.json")], key=lambda path: path.stat().st_mtime
    )
    if not statuses or json.loads(statuses[-1].read_text())["status"] != "running":
        return None
    run = statuses[-1].parent
    seconds = time.time() - max(
        path.stat().st_mtime for path in (statuses[-1], run / "metrics.jsonl", run / "checkpoints") if path.exists()
    )
    return f"{run} is said to run, but has written nothing for {seconds / 60:.0f} minutes" if seconds > SILENT else None


if __name__ == "__main__":
    found = problem(Path("/app/runs"), Path("/tmp/sshd.pid"))
    print(found or "healthy")
    sys.exit(found is not None)
