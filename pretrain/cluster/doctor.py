"""The doctor command: checks all nodes of a run in parallel, and reports what would go wrong.

This module imports little, because it must start the agents immediately.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable

from data_prep.utils.console import UserError, exit_on_user_error
from pretrain.cluster import environment, facts
from pretrain.cluster.agent_pool import AgentPool, local_command, srun_command, ssh_command
from pretrain.cluster.diagnosis import Diagnosis
from pretrain.cluster.findings import as_json, count_levels, format_table
from pretrain.cluster.hosts import LOCAL, Host, read_hostfile, slurm_hosts

logger = logging.getLogger(__name__)

CPU_SLOTS = 2
"""Number of ranks on a single machine without GPUs if neither a hostfile nor --num_gpus sets it."""


def main() -> None:
    """Parse the command line and run the diagnosis; exit with code 1 if a check fails."""
    parser = argparse.ArgumentParser(
        description="Report what would go wrong with a run. Checks the nodes of the hostfile if one is given, else the "
        "nodes of the current Slurm allocation, else this machine. All processes that it starts end with this command."
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="overrides of the file, with dotted keys"
    )
    parser.add_argument(
        "--hostfile", help="DeepSpeed hostfile with a line `host slots=N` for each node; N is its number of ranks"
    )
    parser.add_argument("--num_gpus", type=int, help="ranks per node, as for deepspeed; on CPU, processes per node")
    parser.add_argument("--master_port", type=int, help="port of the rendezvous, as for deepspeed; default: 29500")
    parser.add_argument("--json", action="store_true", help="print findings and measurements as one JSON object")
    parser.add_argument(
        "--write-env",
        action="store_true",
        help="first write the variables of this shell that must be equal on all nodes to .deepspeed_env",
    )
    arguments = parser.parse_intermixed_args()
    exit_on_user_error(lambda: sys.exit(run(arguments)), messages="stderr")  # the findings are the standard output


def run(arguments: argparse.Namespace) -> int:
    """Run the diagnosis, print its findings, and return the exit code."""
    started = time.monotonic()
    hosts, command = _nodes(arguments.hostfile, arguments.num_gpus)
    if arguments.write_env and command is not ssh_command:
        raise UserError(
            "--write-env works only with a hostfile that lists other nodes than localhost: correct --hostfile, "
            "or remove --write-env"
        )
    if arguments.write_env:
        path, skipped = environment.write_env_file(os.environ)
        logger.info(
            f"wrote {path}"
            + (f", without {', '.join(skipped)}: DeepSpeed cannot forward their values" if skipped else "")
        )
    logger.info(f"contacting {', '.join(host.name for host in hosts)}")
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
    """Return the nodes and the function that builds the command of an agent.

    If `ranks` is given, it is the number of ranks per node, instead of the hostfile's slots or the number of GPUs.
    """
    if ranks is not None and ranks < 1:
        raise UserError(f"--num_gpus is {ranks}: set it to the number of ranks per node, at least 1")
    hosts = read_hostfile(hostfile) if hostfile else slurm_hosts()
    if ranks and hosts and not hostfile:
        raise UserError(
            "--num_gpus does not apply in a Slurm allocation, because srun sets the number of ranks per node: remove it"
        )
    if not hosts:
        gpus = len(facts.devices()["gpus"])
        if not ranks and not gpus:
            logger.info(
                f"this machine has no GPU, and neither --hostfile nor --num_gpus is given: assuming {CPU_SLOTS} ranks"
            )
        hosts = [Host(LOCAL, gpus or CPU_SLOTS)]
    if ranks:
        hosts = [Host(host.name, ranks) for host in hosts]
    if [host.name for host in hosts] != [LOCAL]:
        return hosts, ssh_command if hostfile else srun_command
    return hosts, local_command
