"""Checks across nodes: files, environment variables and network. Pure functions that turn facts into findings."""

from collections.abc import Mapping
from typing import Any

from pretrain.cluster.checks_nodes import Check, DiagnosedRun
from pretrain.cluster.estimate import ResourceEstimate
from pretrain.cluster.findings import Facts, Finding, Level, check_identical, format_bytes, shorten_list
from pretrain.run_folder import list_steps

SLOW_PAIR = 0.5
"""Fraction of the median bandwidth below which a pair of nodes counts as slow."""
Pairs = list[dict[str, Any]]
"""Measurements of node pairs: `from`, `to`, and either `latency_seconds` and `bytes_per_second`, or `error`."""


def check_corpus(facts: Facts, local_facts: dict[str, Any], data: str) -> list[Finding]:
    """Check that the manifest, tokenizer and shards are the same on all nodes. Each node may have its own copy."""
    findings = [
        Finding(
            "corpus",
            "fail",
            fact["unreadable"],
            f"mount the corpus on the node, or prepare it: python -m data_prep CONFIG writes {data}",
            (node,),
        )
        for node, fact in facts.items()
        if "unreadable" in fact
    ]
    findings += [
        Finding(
            "corpus",
            "fail",
            f"shards that the manifest lists are missing: {shorten_list(fact['missing'])}",
            f"copy all files of {data} again",
            (node,),
        )
        for node, fact in facts.items()
        if fact.get("missing")
    ]
    readable = {node: fact for node, fact in facts.items() if "unreadable" not in fact}
    comparisons = []
    for part, check in (("manifest", "data manifest"), ("tokenizer", "tokenizer")):
        comparisons += check_identical(
            check,
            {node: fact[part] for node, fact in readable.items()},
            local_facts.get(part),
            "its SHA-256 is",
            f"copy the same {data} to all nodes: rsync -a --delete, or a shared file system",
        )
    return findings + [item for item in comparisons if not findings or item.level != "ok"]


def check_run_folder(facts: Facts, estimate: ResourceEstimate | None, existing: int) -> list[Finding]:
    """Check that the run folder is writable, not in use by another run, and has room for the checkpoints.

    `existing` is the number of checkpoints that are already in the run folder.
    """
    findings = []
    for node, fact in facts.items():
        if "unwritable" in fact:
            findings.append(
                Finding(
                    "run folder",
                    "fail",
                    f"cannot write to {fact['folder']}: {fact['unwritable']}",
                    "mount it writable for this user, or choose a different output_dir",
                    (node,),
                )
            )
    if locked := tuple(node for node, fact in facts.items() if fact["locked"]):
        findings.append(
            Finding(
                "run folder",
                "fail",
                "another run holds the lock of the run folder",
                "wait for that run, end it, or choose a different `name`",
                locked,
            )
        )
    if estimate:
        missing = max(1, estimate.checkpoints - existing) * estimate.checkpoint
        for node, fact in facts.items():
            free = fact["free"]
            if "unwritable" not in fact and free < missing:
                level: Level = "fail" if free < min(missing, 2 * estimate.checkpoint) else "warn"
                problem = (
                    f"{format_bytes(free)} free in {fact['folder']}, "
                    f"but {estimate.checkpoints} checkpoints need at least {format_bytes(missing)}"
                )
                findings.append(
                    Finding(
                        "free space",
                        level,
                        problem,
                        "free some space, lower checkpoint.keep, or choose a different output_dir",
                        (node,),
                    )
                )
        if not any(item.check == "free space" for item in findings):
            findings.append(
                Finding(
                    "free space",
                    "ok",
                    f"{format_bytes(min(fact['free'] for fact in facts.values()))} free, "
                    f"{estimate.checkpoints} checkpoints need about {format_bytes(missing)}",
                )
            )
    if not any(item.check == "run folder" for item in findings):
        findings.insert(0, Finding("run folder", "ok", f"writable: {next(iter(facts.values()))['folder']}"))
    return findings


def check_shared_run_folder(
    seen: Mapping[str, list[str]], authors: list[str], here: str, seen_here: list[str], folder: str
) -> list[Finding]:
    """Check that every node sees the marker files of all nodes and of this machine.

    `seen` maps each node to the authors whose markers it sees. `seen_here` lists the authors whose markers this machine
    sees. `authors` are the machines that could write a marker. `here` is the name of this machine.
    """
    remedy = f"mount the same file system at {folder} on all nodes and on this machine"
    if here in authors and any(here in visible for visible in seen.values()):
        separate = [node for node, visible in seen.items() if here not in visible]
        reference = "this machine"
    else:
        first = next(iter(seen))
        separate = [node for node, visible in seen.items() if first in authors and first not in visible]
        reference = first
    findings = [
        Finding("shared run folder", "fail", f"{folder} is not the folder that {reference} sees", remedy, (node,))
        for node in separate
    ]
    shared_views = [visible for node, visible in seen.items() if node not in separate]
    candidates = [author for author in authors if author not in separate and author != here]
    unseen = [author for author in candidates if any(author not in visible for visible in shared_views)]
    findings += [
        Finding(
            "shared run folder", "fail", f"other nodes do not see the files of this node in {folder}", remedy, (node,)
        )
        for node in unseen
    ]
    if not findings and set(authors) - set(seen_here) - {here}:
        findings.append(
            Finding(
                "shared run folder",
                "warn",
                f"this machine does not see the files of the nodes in {folder}",
                "start supervise.py and report.py on a node: both need that folder",
            )
        )
    return findings or [Finding("shared run folder", "ok", "every node sees the files of all nodes")]


def check_environment(
    local_env: Mapping[str, str], node_envs: Mapping[str, Mapping[str, str]], faults: list[str]
) -> list[Finding]:
    """Check that the nodes have the relevant environment variables of this shell.

    `faults` describe the lines of .deepspeed_env that DeepSpeed cannot read. A missing variable is only a warning,
    because other checks detect whether ranks use the wrong device or network without that variable.
    """
    findings = []
    if faults:
        findings.append(
            Finding(
                "environment",
                "fail",
                shorten_list(faults),
                "write only KEY=VALUE lines, without blank lines, comments or export",
            )
        )
    for name, value in local_env.items():
        differing: dict[str, list[str]] = {}
        for node, values in node_envs.items():
            if values.get(name) != value:
                state = f"{values[name]} on the node" if name in values else "not set on the node"
                differing.setdefault(state, []).append(node)
        for state, nodes in differing.items():
            findings.append(
                Finding(
                    "environment",
                    "warn",
                    f"{name}={value} on this machine, {state}",
                    f"write {name} to .deepspeed_env (with --write-env), or unset it on this machine",
                    tuple(nodes),
                )
            )
    return findings or [
        Finding("environment", "ok", f"{len(local_env)} relevant variables of this shell are the same on all nodes")
    ]


def check_launcher(pdsh: str | None) -> list[Finding]:
    """Check that pdsh, DeepSpeed's default launcher for several nodes, is installed on this machine."""
    return (
        []
        if pdsh
        else [
            Finding(
                "launcher",
                "fail",
                "pdsh is not installed on this machine",
                "apt install pdsh, or start deepspeed with a different --launcher",
            )
        ]
    )


def check_hostnames(facts: Facts, cuda: bool, chosen: bool) -> list[Finding]:
    """Check that no node's own host name resolves to its loopback address.

    Gloo announces that address to the peers, which would try to connect to it. `chosen` means that
    GLOO_SOCKET_IFNAME is set.
    """
    unreachable_nodes = tuple(
        node for node, fact in facts.items() if fact["own"] is None or fact["own"].startswith("127.")
    )
    if not unreachable_nodes or chosen:
        return [
            Finding(
                "host names",
                "ok",
                "GLOO_SOCKET_IFNAME is set" if chosen else "no node resolves its own name to its loopback address",
            )
        ]
    return [
        Finding(
            "host names",
            "warn" if cuda else "fail",
            "the node's own name does not resolve to an address that peers can reach, but gloo announces it to them",
            "correct /etc/hosts, or set GLOO_SOCKET_IFNAME in .deepspeed_env to the interface between the nodes",
            unreachable_nodes,
        )
    ]


def check_rendezvous(
    first: str, address: str | None, port: int, held: dict[str, Any], connections: Mapping[str, dict[str, Any]]
) -> list[Finding]:
    """Check that the rendezvous port is free on the first node, and that the other nodes can connect to it.

    `held` is the result of listening on the port. `connections` are the results of the other nodes' connections to it.
    """
    if address is None:
        return [
            Finding(
                "rendezvous",
                "fail",
                "hostname -I prints no address, but DeepSpeed needs one",
                "configure a network address on the node",
                (first,),
            )
        ]
    if "error" in held:
        return [
            Finding(
                "rendezvous",
                "fail",
                f"port {port} is taken ({held['error']})",
                "end the process that listens on it, or pass a different --master_port to deepspeed and doctor.py",
                (first,),
            )
        ]
    findings = [
        Finding(
            "rendezvous",
            "fail",
            f"cannot connect to {first} ({address}) at port {port}: {answer['error']}",
            f"open port {port} of {first} for the nodes, or pass a different --master_port; "
            "if the address belongs to a different network, pass --master_addr to deepspeed",
            (node,),
        )
        for node, answer in connections.items()
        if "error" in answer
    ]
    return findings or [
        Finding(
            "rendezvous", "ok", f"{address}:{port} is free" + (" and reachable from all nodes" if connections else "")
        )
    ]


def check_node_pairs(pairs: Pairs) -> list[Finding]:
    """Check that every node can connect to every other node, and that no pair is much slower than the median."""
    findings = [
        Finding(
            "network",
            "fail",
            f"cannot connect to {pair['to']}: {pair['error']}",
            f"open all ports between the nodes: check host names, routes and the firewall of {pair['to']}",
            (pair["from"],),
        )
        for pair in pairs
        if "error" in pair
    ]
    measured = sorted((pair for pair in pairs if "error" not in pair), key=lambda pair: pair["bytes_per_second"])
    if not measured:
        return findings
    worst, median = measured[0], measured[len(measured) // 2]["bytes_per_second"]
    latency = max(pair["latency_seconds"] for pair in measured)
    summary = (
        f"slowest {worst['from']} -> {worst['to']}: {worst['bytes_per_second'] / 1e9:.2f} GB/s, "
        f"round trip at most {latency * 1e3:.2f} ms"
    )
    if len(measured) > 2 and worst["bytes_per_second"] < SLOW_PAIR * median:
        return [
            *findings,
            Finding(
                "network",
                "warn",
                f"{summary}; the median is {median / 1e9:.2f} GB/s",
                "check the link and its error counters with ethtool -S: every step waits for the slowest link",
            ),
        ]
    return findings or [Finding("network", "ok", f"{len(pairs)} directions; {summary}")]


def check_all_reduce(
    answers: Mapping[str, dict[str, Any]], measured: list[dict[str, Any]], bucket: int
) -> list[Finding]:
    """Check that all ranks connected and reduced a bucket of gradients; `bucket` is the size of the bucket in bytes."""
    findings = []
    for node, answer in answers.items():
        errors = {"": answer["error"]} if "error" in answer else answer["errors"]
        if errors:
            rank, error = next(iter(errors.items()))
            findings.append(
                Finding(
                    "all-reduce",
                    "fail",
                    (f"rank {rank}: " if rank else "") + error,
                    "fix the other failures first; then set the interface with GLOO_SOCKET_IFNAME or "
                    "NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO logs details",
                    (node,),
                )
            )
    if findings or not measured:
        return findings or [Finding("all-reduce", "fail", "rank 0 returned no measurement", "run doctor.py again")]
    small, large = measured[0], measured[-1]
    size = (
        f"a bucket of {format_bytes(bucket)}"
        if large["bytes"] >= bucket
        else f"{format_bytes(large['bytes'])} (the bucket of {format_bytes(bucket)} would take too long)"
    )
    return [
        Finding(
            "all-reduce",
            "ok",
            f"{small['ranks']} ranks: {size} in {large['seconds']:.3f} s, "
            f"bus {large['bus_bytes_per_second'] / 1e9:.2f} GB/s; "
            f"{small['bytes']} bytes in {small['seconds'] * 1e3:.2f} ms",
        )
    ]


def _check_run_folders(facts: Facts, run: DiagnosedRun) -> list[Finding]:
    return check_run_folder(facts, run.estimate, existing=len(list_steps(run.config.run_dir / "checkpoints")))


CHECKS: dict[str, list[Check]] = {
    "corpus": [lambda facts, run: check_corpus(facts, run.local_facts("corpus"), run.config.data.path)],
    "run_folder": [_check_run_folders],
}
"""Checks by the topic of facts.py whose facts they need."""
