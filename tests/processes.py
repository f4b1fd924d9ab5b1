"""What tests ask about other processes and about the folders that these leave."""

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

TIMEOUT = 1800
"""Seconds that anything waited for may take, on a machine that is ten times too busy: it only ends a test that hangs."""


def processes_of_session(leader: int) -> dict[int, int]:
    """The living processes of a session, and their parents."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # ended meanwhile
            continue
        if int(session) == leader and state != "Z":
            found[int(stat.parent.name)] = int(parent)
    return found


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL a process and all below it, in whatever session, and wait until they are gone."""
    found = [psutil.Process(process.pid)] if process.poll() is None else []
    found += [child for parent in found for child in parent.children(recursive=True)]
    for one in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(found[1:], timeout=TIMEOUT)


def wait_for(true_by_then: Callable[[], bool], seconds: float = TIMEOUT) -> None:
    """Poll until the condition holds; fail if it still does not after that many seconds."""
    deadline = time.monotonic() + seconds
    while not true_by_then():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def contents(folder: Path) -> dict[str, bytes]:
    """All that a preparation leaves, but for the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
