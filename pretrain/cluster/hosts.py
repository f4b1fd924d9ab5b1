"""The nodes of a run: from a hostfile, from Slurm, or this machine alone."""

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from data_prep.console import UserError

LOCAL = "localhost"
BOM = "\ufeff"
ENTRY = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")
"""A line of DeepSpeed's hostfile. DeepSpeed's own reader takes seconds to import."""


@dataclass(frozen=True)
class Host:
    """A node."""

    name: str
    slots: int
    """Ranks that run on it."""


def read_hostfile(path: str) -> list[Host]:
    """The nodes of a hostfile, in its order. Raises UserError naming the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the hostfile {path}: {getattr(error, 'strerror', None) or 'it is no text'}"
        ) from None
    if lines and lines[0].startswith(BOM):
        raise UserError(
            f"{path}, line 1: the file starts with a byte order mark, which DeepSpeed takes for the first letter of the first host: "
            f"save it as UTF-8 without one, or run: sed -i '1s/^\\xef\\xbb\\xbf//' {shlex.quote(path)}"
        )
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        found = ENTRY.fullmatch(line)
        if not found or int(found[2]) < 1 or found[1].startswith("-"):
            raise UserError(f"{path}, line {number}: {line!r} is no entry of a hostfile: write `host slots=N`")
        if found[1] in hosts:
            raise UserError(
                f"{path}, line {number}: {found[1]} stands there twice, which DeepSpeed refuses: give it one line"
            )
        hosts[found[1]] = Host(found[1], int(found[2]))
    if not hosts:
        raise UserError(f"the hostfile {path} names no host: write `host slots=N` lines")
    return list(hosts.values())


def slurm_hosts() -> list[Host]:
    """The nodes of the Slurm allocation that this process stands in, with the tasks that Slurm gives each; none outside of one."""
    nodes, tasks = os.environ.get("SLURM_JOB_NODELIST"), os.environ.get("SLURM_TASKS_PER_NODE")
    if nodes is None or tasks is None:
        return []
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"cannot expand SLURM_JOB_NODELIST={nodes} with scontrol ({error}); give a --hostfile"
        ) from None
    return [Host(name, slots) for name, slots in zip(names, _expand_tasks(tasks), strict=False)]


def _expand_tasks(tasks: str) -> list[int]:
    """`2(x3),1` -> 2, 2, 2, 1."""
    return [int(found[1]) for found in re.finditer(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(found[2] or 1))]
