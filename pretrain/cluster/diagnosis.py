"""One diagnosis: asks the nodes in the order in which answers are needed, and puts what they say before the checks."""

import math
import os
import secrets
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data_prep.console import UserError
from pretrain.cluster import checks_nodes, checks_run, environment, facts, network, sharing
from pretrain.cluster.agent_pool import START_TIMEOUT_SECONDS, AgentPool, local_command, srun_command, ssh_command
from pretrain.cluster.estimate import ResourceEstimate, estimate_resources
from pretrain.cluster.findings import Finding, merge_findings
from pretrain.config import RunConfig, load_config
from pretrain.relevant_env import relevant_env
from pretrain.run_folder import list_steps

FACT_SECONDS = 30.0
"""That a node has for one group of facts: a file system that hangs takes longer."""
PINGS = 5
STREAM_SECONDS, NETWORK_SECONDS = 0.3, 60.0
"""Of one bandwidth at most, and of all together."""
REDUCE_SECONDS = 120.0
HERE = "this machine"
PORT = 29500
"""DeepSpeed's, where no other is given."""


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


class Diagnosis:
    """Findings and measurements of a run's nodes."""

    def __init__(self, agents: AgentPool):
        self.agents = agents
        self.findings: list[Finding] = []
        self.measurements: dict[str, list[dict[str, Any]]] = {"all_reduce": [], "pairs": []}

    def diagnose(self, config: str, overrides: list[str], port: int | None) -> None:
        """Ask for everything. Raises UserError for a configuration that cannot be read."""
        pool = ThreadPoolExecutor(1)
        try:
            reached = pool.submit(
                self.agents.call_nodes, "time", START_TIMEOUT_SECONDS
            )  # while this process reads the configuration
            self.config = load_config(config, overrides)
            reached.result()
            say("looking at the nodes, and planning the run")
            looked = pool.submit(self._look)
            self.estimate = self._plan()
            looked.result()
        finally:
            pool.shutdown(wait=False)  # after a mistake, nobody waits for a node that does not answer
        self.seen = {topic: self._seen(topic) for topic in facts.TOPICS}
        if self.agents.nodes:
            self._check_facts()
            say("connecting all pairs")
            can_meet = self._check_network(port)
            self._check_all_reduce(can_meet)
        self.findings = merge_findings(
            checks_nodes.check_reachable(self.agents.nodes, self.agents.unreachable) + self.findings
        )

    @property
    def slots(self) -> dict[str, int]:
        """Ranks of each node that answers."""
        return {host.name: host.slots for host in self.agents.hosts if host.name in self.agents.nodes}

    @property
    def cuda(self) -> bool:
        """Whether the ranks will be on GPUs."""
        return any(fact["accelerator"] == "cuda" for fact in self.seen["devices"].values())

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

    def _look(self) -> None:
        """Ask for all that is so on the nodes."""
        self.local_env = relevant_env(os.environ)
        values = {}
        if self.agents.command is ssh_command:
            values = (
                environment.forwarded_variables(os.environ, facts.devices()["accelerator"] == "cuda")
                | environment.read_env_files()
            )
        self.node_envs = self.agents.call_nodes(
            "environment", FACT_SECONDS, lambda node: {"values": values, "asked": list(self.local_env)}
        )
        self.facts = {topic: self._fact(topic) for topic in facts.TOPICS}
        self.offsets = self._clocks()
        self.notes = self._leave_notes()

    def _fact(self, topic: str) -> dict[str, Any]:
        settings = _settings(self.config, topic)
        return self.agents.call_nodes("fact", FACT_SECONDS, lambda node: {"topic": topic, "settings": settings})

    def _clocks(self) -> dict[str, float]:
        """Seconds by which each node is ahead of this machine, from the shortest of a few round trips."""
        best: dict[str, tuple[float, float]] = {}
        for node in self.agents.nodes * PINGS:
            before = time.time()
            answer = self.agents.call_nodes("time", FACT_SECONDS, nodes=[node])
            after = time.time()
            if node in answer:
                best[node] = min(best.get(node, (math.inf, 0.0)), (after - before, answer[node] - (before + after) / 2))
        return {node: offset for node, (_, offset) in best.items()}

    def _leave_notes(self) -> dict[str, Any]:
        """Files of every node and of this machine in the run folder, and who sees whose."""
        folder, token = str(sharing.nearest_existing_folder(str(self.config.run_dir))), secrets.token_hex(4)
        try:
            left = self.agents.call_nodes(
                "write_marker", FACT_SECONDS, lambda node: {"folder": folder, "token": token, "author": node}
            )
            left[HERE] = sharing.write_marker(folder, token, HERE)
            authors = [author for author, answer in left.items() if "error" not in answer]
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

    def _seen(self, topic: str) -> dict[str, dict[str, Any]]:
        """The facts of the nodes that could find them out."""
        seen = {}
        for node in self.agents.nodes:
            fact = self.facts[topic][node]
            if "error" in fact:
                self.findings.append(
                    Finding(
                        topic.replace("_", " "),
                        "fail",
                        fact["error"],
                        "look at that node: this should not happen",
                        (node,),
                    )
                )
            else:
                seen[node] = fact
        return seen

    def _check_facts(self) -> None:
        config, slots, estimate, several = self.config, self.slots, self.estimate, len(self.agents.hosts) > 1
        existing = len(list_steps(config.run_dir / "checkpoints"))

        def here(topic: str) -> dict[str, Any]:
            return facts.TOPICS[topic](**_settings(config, topic))

        checks = {
            "python_and_system": lambda seen: checks_nodes.check_python(seen, here("python_and_system")),
            "packages": checks_nodes.check_packages,
            "code": lambda seen: checks_nodes.check_code(seen, here("code")),
            "corpus": lambda seen: checks_run.check_corpus(seen, here("corpus"), config.data.path),
            "run_folder": lambda seen: (
                checks_run.check_run_folder(seen, estimate, existing)
                + (checks_run.check_shared_run_folder(**self.notes) if several else [])
            ),
            "devices": lambda seen: checks_nodes.check_devices(seen, slots, os.environ.get("DS_ACCELERATOR")),
            "memory": lambda seen: (
                checks_nodes.check_shared_memory(seen, slots, self.cuda)
                + (checks_nodes.check_memory(seen, self.seen["devices"], slots, estimate) if estimate else [])
            ),
            "extensions": lambda seen: checks_nodes.check_extensions(seen, self.cuda, config.train.compile),
        }
        for topic, check in checks.items():
            if self.seen[topic]:
                self.findings += check(self.seen[topic])
        self.findings += checks_nodes.check_clock(self.offsets)
        if self.agents.command is ssh_command:
            faults = [
                f"{path}: {fault}" for path in environment.env_files() for fault in environment.invalid_lines(path)
            ]
            self.findings += checks_run.check_environment(self.local_env, self.node_envs, faults)
            self.findings += checks_run.check_launcher(shutil.which("pdsh"))

    def _check_network(self, port: int | None) -> bool:
        """Whether the ranks can meet."""
        found, first = [], self.agents.nodes[0]
        self.address, self.port = self._rendezvous(first, port)
        held = self.agents.call_nodes("hold_port", FACT_SECONDS, lambda node: {"port": self.port}, [first]).get(
            first, {"error": "no answer"}
        )
        tried = {}
        if "error" not in held:
            if self.address:
                tried = self.agents.call_nodes(
                    "connect",
                    FACT_SECONDS,
                    lambda node: {"host": self.address, "port": self.port},
                    self.agents.nodes[1:],
                )
            self.agents.call_nodes("release_port", FACT_SECONDS, lambda node: {"port": self.port}, [first])
        found += checks_run.check_rendezvous(first, self.address, self.port, held, tried)
        if len(self.agents.nodes) > 1:
            chosen = all("GLOO_SOCKET_IFNAME" in values for values in self.node_envs.values())
            found += checks_run.check_hostnames(self.seen["addresses"], self.cuda, chosen)
            self._measure_pairs()
            found += checks_run.check_node_pairs(self.measurements["pairs"])
        self.findings += found
        return all(finding.level != "fail" for finding in found)

    def _rendezvous(self, first: str, port: int | None) -> tuple[str | None, int]:
        """Where the ranks will meet, as their launcher chooses it."""
        if self.agents.command is local_command:
            return "127.0.0.1", port or PORT
        if self.agents.command is srun_command:
            from pretrain.training.distributed import slurm_port

            return first, port or slurm_port()
        return self.seen["addresses"].get(first, {}).get("first"), port or PORT

    def _measure_pairs(self) -> None:
        """One after the other in both directions, and pairs without a common node at the same time."""
        ports = self.agents.call_nodes("serve", FACT_SECONDS)
        rounds = network.rounds(list(ports))
        seconds = min(STREAM_SECONDS, NETWORK_SECONDS / 2 / len(rounds))
        for pairs in rounds:
            for target in (dict(pairs), {other: one for one, other in pairs}):
                ends = dict(target)

                def stream_to(node: str, ends: dict[str, str] = ends) -> dict[str, Any]:
                    return {"host": ends[node], "port": ports[ends[node]], "seconds": seconds}

                answers = self.agents.call_nodes("measure", FACT_SECONDS, stream_to, ends)
                self.measurements["pairs"] += [
                    {"from": node, "to": ends[node]} | answer for node, answer in answers.items()
                ]

    def _check_all_reduce(self, can_meet: bool) -> None:
        if not can_meet or self.estimate is None:
            why = "the ranks could not meet" if self.estimate else "the configuration cannot be planned"
            self.findings.append(
                Finding("all-reduce", "warn", f"not tried: {why}", "mend what is shown above, and ask again")
            )
            return
        slots, bucket, precision = self.slots, self.estimate.bucket, self.estimate.precision
        first_rank, world = {}, 0
        for node, ranks in slots.items():
            first_rank[node], world = world, world + ranks
        say(f"an all-reduce over {world} ranks")
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


def _settings(config: RunConfig, topic: str) -> dict[str, Any]:
    """What a group of facts must be told."""
    return {"corpus": {"data": config.data.path}, "run_folder": {"run_dir": str(config.run_dir)}}.get(topic, {})
