"""Health check of a container: exit code 0, or 1 with a line that describes the problem.

The runs folder must be writable. If sshd was started, it must answer. If the status of the newest run is `running`,
the run must have written something within the last hour. The check needs only the Python standard library, so it
costs a run almost no time.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

SSHD_PORT = 2222
SILENT_SECONDS = 3600.0
"""Longest silence of a healthy run, in seconds. A run that hangs ends itself within half an hour. A longer silence
means that the run was killed or suspended."""


def problem(runs: Path, sshd_pid: Path) -> str | None:
    """Return a description of the problem in one line; None if there is none."""
    if not os.access(runs, os.W_OK):
        return f"user {os.getuid()} cannot write to {runs}: mount a volume there that this user owns"
    if sshd_pid.exists():
        try:
            with socket.create_connection(("127.0.0.1", SSHD_PORT), timeout=5) as connection:
                connection.sendall(b"SSH-2.0-healthcheck\r\n")  # otherwise sshd logs an error
                greeting = connection.recv(4)
        except OSError as error:
            return f"sshd does not answer: {error}; restart the container"
        if greeting != b"SSH-":
            return "a program other than sshd answers on the port of sshd: stop it"
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
    if seconds <= SILENT_SECONDS:
        return None
    return f"the status of {run} is `running`, but it has written nothing for {seconds / 60:.0f} minutes: restart it"


if __name__ == "__main__":
    message = problem(Path("/app/runs"), Path("/tmp/sshd.pid"))
    print(message or "healthy")
    sys.exit(message is not None)
