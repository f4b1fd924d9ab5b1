"""The command: asks all nodes of a run at once, and says what would go wrong. Imports little, so that the agents start at once."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

from data_prep.console import UserError, exit_on_user_error
from pretrain.cluster import environment, facts
from pretrain.cluster.agent_pool import AgentPool, local_command, srun_command, ssh_command
from pretrain.cluster.diagnosis import Diagnosis, say
from pretrain.cluster.findings import as_json, count_levels, format_table
from pretrain.cluster.hosts import LOCAL, Host, read_hostfile, slurm_hosts

CPU_SLOTS = 2
"""Ranks on this machine alone if it has no GPU, and neither a hostfile nor --num_gpus says how many."""


def main() -> None:
    """Parse the command line and diagnose; exit code 1 where something fails."""
    parser = argparse.ArgumentParser(
        description="Tell what would go wrong with a run: on the nodes of a hostfile; without one on those of the Slurm "
        "allocation around it; without that on this machine. Nothing that it starts lasts."
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the YAML file")
    parser.add_argument("--hostfile", help="nodes and their ranks, as for deepspeed: lines of `host slots=N`")
    parser.add_argument("--num_gpus", type=int, help="ranks of each node, as for deepspeed; on CPU, processes")
    parser.add_argument("--master_port", type=int, help="where the ranks will meet, as for deepspeed (default 29500)")
    parser.add_argument("--json", action="store_true", help="print findings and measurements as one JSON object")
    parser.add_argument(
        "--write-env", action="store_true", help="first write what matters of this shell's variables to .deepspeed_env"
    )
    arguments = parser.parse_intermixed_args()
    exit_on_user_error(lambda: sys.exit(run(arguments)))


def run(arguments: argparse.Namespace) -> int:
    """Diagnose, print, and return the exit code."""
    started = time.monotonic()
    hosts, command = _nodes(arguments.hostfile, arguments.num_gpus)
    if arguments.write_env and command is not ssh_command:
        raise UserError("--write-env concerns the nodes of a hostfile: give --hostfile, or leave it out")
    if arguments.write_env:
        path, left_out = environment.write_env_file(os.environ)
        say(
            f"wrote {path}"
            + (f", without {', '.join(left_out)}: DeepSpeed cannot hand on such values" if left_out else "")
        )
    say(f"asking {', '.join(host.name for host in hosts)}")
    agents = AgentPool(hosts, command)
    diagnosis = Diagnosis(agents)
    try:
        diagnosis.diagnose(arguments.config, arguments.overrides, arguments.master_port)
    finally:
        agents.close()
    counts = count_levels(diagnosis.findings)
    if arguments.json:
        print(
            json.dumps(
                {
                    "findings": as_json(diagnosis.findings),
                    "counts": counts,
                    "measurements": diagnosis.measurements,
                    "nodes": [{"name": host.name, "slots": host.slots} for host in hosts],
                    "seconds": time.monotonic() - started,
                },
                indent=2,
            )
        )
    else:
        print(format_table(diagnosis.findings))
    return 1 if counts["fail"] else 0


def _nodes(hostfile: str | None, ranks: int | None) -> tuple[list[Host], Callable[[Host], list[str]]]:
    """Return the nodes, and how an agent is started on one. `ranks` of each node replace what the hostfile or the GPUs say."""
    if ranks is not None and ranks < 1:
        raise UserError(f"--num_gpus is {ranks}: give the number of ranks of each node, at least 1")
    hosts = read_hostfile(hostfile) if hostfile else slurm_hosts()
    if ranks and hosts and not hostfile:
        raise UserError(
            "--num_gpus is for deepspeed: in a Slurm allocation srun decides how many ranks a node has; leave it out"
        )
    if not hosts:
        gpus = len(facts.devices()["gpus"])
        if not ranks and not gpus:
            say(f"no GPU here, and neither --hostfile nor --num_gpus: assuming {CPU_SLOTS} ranks")
        hosts = [Host(LOCAL, gpus or CPU_SLOTS)]
    if ranks:
        hosts = [Host(host.name, ranks) for host in hosts]
    if [host.name for host in hosts] != [LOCAL]:
        return hosts, ssh_command if hostfile else srun_command
    return hosts, local_command
