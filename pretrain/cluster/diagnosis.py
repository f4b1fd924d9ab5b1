"""Diagnosis of a run's nodes: collects facts and measurements from the agents, and passes them to the checks."""

import logging
import math
import os
import secrets
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data_prep.utils.console import UserError
from pretrain.cluster import checks_nodes, checks_run, environment, facts, network, sharing
from pretrain.cluster.agent_pool import START_TIMEOUT_SECONDS, AgentPool, local_command, srun_command, ssh_command
from pretrain.cluster.estimate import ResourceEstimate, estimate_resources
from pretrain.cluster.findings import Finding, merge_findings
from pretrain.config import RunConfig, load_config
from pretrain.relevant_env import relevant_env

logger = logging.getLogger(__name__)

FACT_SECONDS = 30.0
"""Timeout for one group of facts of a node, in seconds. A node with a hanging file system exceeds it."""
PINGS = 5
"""Number of round trips per node for the clock offset."""
STREAM_SECONDS, NETWORK_SECONDS = 0.3, 60.0
"""Time limits of one bandwidth measurement and of all bandwidth measurements together, in seconds."""
REDUCE_SECONDS = 120.0
"""Timeout of the all-reduce, in seconds."""
HERE = "this machine"
PORT = 29500
"""DeepSpeed's default port for the rendezvous."""


class Diagnosis:
    """Findings and measurements of a run's nodes."""

    def __init__(self, agents: AgentPool):
        self.agents = agents
        self.findings: list[Finding] = []
        self.measurements: dict[str, list[dict[str, Any]]] = {"all_reduce": [], "pairs": []}

    def diagnose(self, config: str, overrides: list[str], port: int | None) -> None:
        """Run all checks; `port` is the rendezvous port. Raises UserError if the configuration cannot be read."""
        pool = ThreadPoolExecutor(1)
        try:
            # The agents start while this process reads the configuration.
            first_answers = pool.submit(self.agents.call_nodes, "time", START_TIMEOUT_SECONDS)
            self.config = load_config(config, overrides)
            first_answers.result()
            logger.info("checking the nodes and planning the run")
            collection = pool.submit(self._collect_facts)
            self.estimate = self._plan()
            collection.result()
        finally:
            pool.shutdown(wait=False)  # after an error, do not wait for a node that does not answer
        self.valid_facts = {topic: self._valid_facts(topic) for topic in facts.TOPICS}
        if self.agents.nodes:
            self._check_facts()
            logger.info("connecting all pairs of nodes")
            ranks_can_connect = self._check_network(port)
            self._check_all_reduce(ranks_can_connect)
        self.findings = merge_findings(
            checks_nodes.check_reachable(self.agents.nodes, self.agents.unreachable) + self.findings
        )

    @property
    def slots(self) -> dict[str, int]:
        """Number of ranks of each node that answers."""
        return {host.name: host.slots for host in self.agents.hosts if host.name in self.agents.nodes}

    @property
    def cuda(self) -> bool:
        """Whether the ranks will use GPUs."""
        return any(fact["accelerator"] == "cuda" for fact in self.valid_facts["devices"].values())

    def _plan(self) -> ResourceEstimate | None:
        try:
            estimate = estimate_resources(self.config, sum(host.slots for host in self.agents.hosts))
        except UserError as error:
            self.findings.append(
                Finding("configuration", "fail", str(error), "change the configuration, the corpus or the hostfile")
            )
            return None
        self.findings.append(Finding("configuration", "ok", f"{estimate.parameters:,} parameters"))
        return estimate

    def _collect_facts(self) -> None:
        """Collect the environment, the facts, the clock offsets and the visible markers of all nodes."""
        self.local_env = relevant_env(os.environ)
        values = {}
        if self.agents.command is ssh_command:
            values = (
                environment.forwarded_variables(os.environ, facts.devices()["accelerator"] == "cuda")
                | environment.read_env_files()
            )
        self.node_envs = self.agents.call_nodes(
            "environment", FACT_SECONDS, lambda node: {"values": values, "names": list(self.local_env)}
        )
        self.facts = {topic: self._collect_topic(topic) for topic in facts.TOPICS}
        self.offsets = self._clock_offsets()
        self.markers = self._exchange_markers()

    def _collect_topic(self, topic: str) -> dict[str, Any]:
        settings = _topic_arguments(self.config, topic)
        return self.agents.call_nodes("fact", FACT_SECONDS, lambda node: {"topic": topic, "settings": settings})

    def _clock_offsets(self) -> dict[str, float]:
        """Return how far the clock of each node is ahead of this machine's, in seconds.

        The offset comes from the shortest of PINGS round trips.
        """
        best: dict[str, tuple[float, float]] = {}
        for node in self.agents.nodes * PINGS:
            before = time.time()
            answer = self.agents.call_nodes("time", FACT_SECONDS, nodes=[node])
            after = time.time()
            if node in answer:
                best[node] = min(best.get(node, (math.inf, 0.0)), (after - before, answer[node] - (before + after) / 2))
        return {node: offset for node, (_, offset) in best.items()}

    def _exchange_markers(self) -> dict[str, Any]:
        """Let every node and this machine write a marker file to the run folder, and find out who sees which markers.

        Returns the arguments of `checks_run.check_shared_run_folder`. All markers are removed.
        """
        folder = str(sharing.nearest_existing_folder(str(self.config.run_dir)))
        token = secrets.token_hex(4)
        try:
            written = self.agents.call_nodes(
                "write_marker", FACT_SECONDS, lambda node: {"folder": folder, "token": token, "author": node}
            )
            written[HERE] = sharing.write_marker(folder, token, HERE)
            authors = [author for author, answer in written.items() if "error" not in answer]
            seen = self.agents.call_nodes(
                "visible_markers", FACT_SECONDS, lambda node: {"folder": folder, "token": token, "authors": authors}
            )
            return {
                "seen": seen,
                "authors": authors,
                "here": HERE,
                "seen_here": sharing.visible_markers(folder, token, authors),
                "folder": folder,
            }
        finally:
            self.agents.call_nodes("remove_markers", FACT_SECONDS, lambda node: {"folder": folder, "token": token})
            sharing.remove_markers(folder, token)

    def _valid_facts(self, topic: str) -> dict[str, dict[str, Any]]:
        """Return the facts of the nodes that could collect them, and add a finding for each other node."""
        valid = {}
        for node in self.agents.nodes:
            fact = self.facts[topic][node]
            if "error" in fact:
                self.findings.append(
                    Finding(
                        topic.replace("_", " "),
                        "fail",
                        fact["error"],
                        "inspect the node: this error is unexpected",
                        (node,),
                    )
                )
            else:
                valid[node] = fact
        return valid

    def _check_facts(self) -> None:
        run = checks_nodes.DiagnosedRun(
            self.config,
            self.slots,
            self.cuda,
            self.estimate,
            self.valid_facts,
            lambda topic: facts.TOPICS[topic](**_topic_arguments(self.config, topic)),
        )
        for topic, valid in self.valid_facts.items():
            for check in checks_nodes.CHECKS.get(topic, []) + checks_run.CHECKS.get(topic, []):
                self.findings += check(valid, run) if valid else []
        if self.valid_facts["run_folder"] and len(self.agents.hosts) > 1:
            self.findings += checks_run.check_shared_run_folder(**self.markers)
        self.findings += checks_nodes.check_clock(self.offsets)
        if self.agents.command is ssh_command:
            faults = [
                f"{path}: {fault}" for path in environment.env_files() for fault in environment.invalid_lines(path)
            ]
            self.findings += checks_run.check_environment(self.local_env, self.node_envs, faults)
            self.findings += checks_run.check_launcher(shutil.which("pdsh"))

    def _check_network(self, port: int | None) -> bool:
        """Check the rendezvous and all pairs of nodes, and return whether the ranks can connect."""
        findings = []
        first = self.agents.nodes[0]
        self.address, self.port = self._rendezvous(first, port)
        held = self.agents.call_nodes("hold_port", FACT_SECONDS, lambda node: {"port": self.port}, [first]).get(
            first, {"error": "no answer"}
        )
        connections = {}
        if "error" not in held:
            if self.address:
                connections = self.agents.call_nodes(
                    "connect",
                    FACT_SECONDS,
                    lambda node: {"host": self.address, "port": self.port},
                    self.agents.nodes[1:],
                )
            self.agents.call_nodes("release_port", FACT_SECONDS, lambda node: {"port": self.port}, [first])
        findings += checks_run.check_rendezvous(first, self.address, self.port, held, connections)
        if len(self.agents.nodes) > 1:
            chosen = all("GLOO_SOCKET_IFNAME" in values for values in self.node_envs.values())
            findings += checks_run.check_hostnames(self.valid_facts["addresses"], self.cuda, chosen)
            self._measure_pairs()
            findings += checks_run.check_node_pairs(self.measurements["pairs"])
        self.findings += findings
        return all(finding.level != "fail" for finding in findings)

    def _rendezvous(self, first: str, port: int | None) -> tuple[str | None, int]:
        """Return the address (None if unknown) and port of the rendezvous that the launcher would choose."""
        if self.agents.command is local_command:
            return "127.0.0.1", port or PORT
        if self.agents.command is srun_command:
            from pretrain.training.distributed import slurm_port

            return first, port or slurm_port()
        return self.valid_facts["addresses"].get(first, {}).get("first"), port or PORT

    def _measure_pairs(self) -> None:
        """Measure latency and bandwidth of all pairs, first in one direction and then in the other.

        Pairs without a common node are measured at the same time.
        """
        ports = self.agents.call_nodes("serve", FACT_SECONDS)
        rounds = network.rounds(list(ports))
        seconds = min(STREAM_SECONDS, NETWORK_SECONDS / 2 / len(rounds))
        for pairs in rounds:
            for pairing in (dict(pairs), {second: first for first, second in pairs}):
                targets = dict(pairing)

                def stream_to(node: str, targets: dict[str, str] = targets) -> dict[str, Any]:
                    return {"host": targets[node], "port": ports[targets[node]], "seconds": seconds}

                answers = self.agents.call_nodes("measure", FACT_SECONDS, stream_to, targets)
                self.measurements["pairs"] += [
                    {"from": node, "to": targets[node]} | answer for node, answer in answers.items()
                ]

    def _check_all_reduce(self, ranks_can_connect: bool) -> None:
        if not ranks_can_connect or self.estimate is None:
            reason = "the ranks cannot connect" if self.estimate else "no plan for this configuration"
            self.findings.append(
                Finding(
                    "all-reduce", "warn", f"not tried: {reason}", "fix the failures above, then run doctor.py again"
                )
            )
            return
        slots, bucket, precision = self.slots, self.estimate.bucket, self.estimate.precision
        first_rank = {}
        world = 0
        for node, ranks in slots.items():
            first_rank[node] = world
            world += ranks
        logger.info(f"running an all-reduce over {world} ranks")
        answers = self.agents.call_nodes(
            "all_reduce",
            REDUCE_SECONDS + 10,
            lambda node: {
                "ranks": list(range(first_rank[node], first_rank[node] + slots[node])),
                "world": world,
                "address": self.address,
                "port": self.port,
                "bucket": bucket,
                "precision": precision,
                "cuda": self.cuda,
                "seconds": REDUCE_SECONDS,
            },
        )
        self.measurements["all_reduce"] = next(
            (answer["measured"] for answer in answers.values() if answer.get("measured")), []
        )
        self.findings += checks_run.check_all_reduce(answers, self.measurements["all_reduce"], bucket)


def _topic_arguments(config: RunConfig, topic: str) -> dict[str, Any]:
    """Return the arguments of the function that collects a group of facts."""
    return {"corpus": {"data": config.data.path}, "run_folder": {"run_dir": str(config.run_dir)}}.get(topic, {})
