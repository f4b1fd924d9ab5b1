"""Helpers for processes under test and the folders that they write."""

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

TIMEOUT = 1800
"""Time limit of every wait, in seconds. It ends only tests that hang, even under ten times too much load."""


def processes_of_session(leader: int) -> dict[int, int]:
    """Return the parent of each living process of a session, by process id."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # the process has just ended
            continue
        if int(session) == leader and state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    return parents


def kill_all(process: subprocess.Popen) -> None:
    """Send SIGKILL to a process and all its descendants, in any session, and wait until they have ended."""
    processes = [psutil.Process(process.pid)] if process.poll() is None else []
    processes += [child for parent in processes for child in parent.children(recursive=True)]
    for target in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            target.kill()
    process.wait()
    psutil.wait_procs(processes[1:], timeout=TIMEOUT)


def wait_for(condition: Callable[[], bool], seconds: float = TIMEOUT) -> None:
    """Poll until the condition holds, and fail after this number of seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds} s"
        time.sleep(0.001)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a prepared corpus except the lock, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
