"""The nodes of a run: from a hostfile, from Slurm, or this machine alone."""

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from data_prep.utils.console import UserError

LOCAL = "localhost"
BOM = "\ufeff"
ENTRY = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")
"""Format of a line of DeepSpeed's hostfile. DeepSpeed's own reader is not used, because it takes seconds to import."""


@dataclass(frozen=True)
class Host:
    """A node of the run."""

    name: str
    slots: int
    """Number of ranks on the node."""


def read_hostfile(path: str) -> list[Host]:
    """Return the nodes of a hostfile, in the order of its lines.

    Raises UserError, with the line number, for an invalid line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the hostfile {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}"
        ) from None
    if lines and lines[0].startswith(BOM):
        raise UserError(
            f"{path}, line 1: the file starts with a byte order mark, which DeepSpeed reads as part of the first "
            "host name: save it as UTF-8 without a byte order mark, or run: "
            f"sed -i '1s/^\\xef\\xbb\\xbf//' {shlex.quote(path)}"
        )
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        entry = ENTRY.fullmatch(line)
        if not entry or int(entry[2]) < 1 or entry[1].startswith("-"):
            raise UserError(f"{path}, line {number}: {line!r} is not a hostfile entry: write `host slots=N`")
        if entry[1] in hosts:
            raise UserError(
                f"{path}, line {number}: {entry[1]} is listed twice, which DeepSpeed rejects: remove one of the lines"
            )
        hosts[entry[1]] = Host(entry[1], int(entry[2]))
    if not hosts:
        raise UserError(f"the hostfile {path} names no host: add `host slots=N` lines")
    return list(hosts.values())


def slurm_hosts() -> list[Host]:
    """Return the nodes of the current Slurm allocation with their numbers of tasks; empty outside an allocation.

    Raises UserError if scontrol cannot expand the list of nodes.
    """
    nodes, tasks = os.environ.get("SLURM_JOB_NODELIST"), os.environ.get("SLURM_TASKS_PER_NODE")
    if nodes is None or tasks is None:
        return []
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"cannot expand SLURM_JOB_NODELIST={nodes} with scontrol ({error}): pass a --hostfile"
        ) from None
    return [Host(name, slots) for name, slots in zip(names, _expand_tasks(tasks), strict=False)]


def _expand_tasks(tasks: str) -> list[int]:
    """Expand Slurm's notation to the number of tasks of each node: `2(x3),1` means 2, 2, 2, 1."""
    return [int(match[1]) for match in re.finditer(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(match[2] or 1))]
