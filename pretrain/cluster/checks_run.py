"""Checks of what the nodes are to each other and to the run: files, variables, network. Pure functions from what was seen to findings."""

from collections.abc import Mapping
from typing import Any

from pretrain.cluster.checks_nodes import Facts, check_identical
from pretrain.cluster.estimate import ResourceEstimate
from pretrain.cluster.findings import Finding, Level, format_bytes, shorten_list

SLOW_PAIR = 0.5
"""Of the median bandwidth, below which a pair holds the others up."""
Pairs = list[dict[str, Any]]
"""What was measured from one node to another: `from`, `to`, and `latency_seconds` and `bytes_per_second`, or `error`."""


def check_corpus(facts: Facts, here: dict[str, Any], data: str) -> list[Finding]:
    """The same manifest, tokenizer and shards everywhere. Every node may have a copy of its own."""
    found = [
        Finding(
            "corpus",
            "fail",
            fact["unreadable"],
            f"prepare or mount the corpus there: python -m data_prep CONFIG makes {data}",
            (node,),
        )
        for node, fact in facts.items()
        if "unreadable" in fact
    ]
    found += [
        Finding(
            "corpus",
            "fail",
            f"the manifest lists shards that are not there: {shorten_list(fact['missing'])}",
            f"copy {data} again, whole",
            (node,),
        )
        for node, fact in facts.items()
        if fact.get("missing")
    ]
    there = {node: fact for node, fact in facts.items() if "unreadable" not in fact}
    alike = []
    for part, word in (("manifest", "data manifest"), ("tokenizer", "tokenizer")):
        alike += check_identical(
            word,
            {node: fact[part] for node, fact in there.items()},
            here.get(part),
            "it has SHA-256",
            f"bring the same {data} to all nodes: rsync -a --delete, or a shared file system",
        )
    return found + [item for item in alike if not found or item.level != "ok"]


def check_run_folder(facts: Facts, estimate: ResourceEstimate | None, existing: int) -> list[Finding]:
    """Writable, not taken by another run, and with room for what the run keeps; `existing` checkpoints stand there already."""
    found = []
    for node, fact in facts.items():
        if "unwritable" in fact:
            found.append(
                Finding(
                    "run folder",
                    "fail",
                    f"cannot write to {fact['folder']}: {fact['unwritable']}",
                    "mount it writable for this user, or choose another output_dir",
                    (node,),
                )
            )
    if locked := tuple(node for node, fact in facts.items() if fact["locked"]):
        found.append(
            Finding(
                "run folder",
                "fail",
                "another run holds its lock",
                "wait for that run or end it, or choose another `name`",
                locked,
            )
        )
    if estimate:
        missing = max(1, estimate.checkpoints - existing) * estimate.checkpoint
        for node, fact in facts.items():
            free = fact["free"]
            if "unwritable" not in fact and free < missing:
                level: Level = "fail" if free < min(missing, 2 * estimate.checkpoint) else "warn"
                seen = f"{format_bytes(free)} free in {fact['folder']}, {estimate.checkpoints} checkpoints take {format_bytes(missing)} or more"
                found.append(
                    Finding(
                        "free space",
                        level,
                        seen,
                        "make room, lower checkpoint.keep, or choose another output_dir",
                        (node,),
                    )
                )
        if not any(item.check == "free space" for item in found):
            found.append(
                Finding(
                    "free space",
                    "ok",
                    f"{format_bytes(min(fact['free'] for fact in facts.values()))} free, "
                    f"{estimate.checkpoints} checkpoints take about {format_bytes(missing)}",
                )
            )
    if not any(item.check == "run folder" for item in found):
        found.insert(0, Finding("run folder", "ok", f"writable: {next(iter(facts.values()))['folder']}"))
    return found


def check_shared_run_folder(
    seen: Mapping[str, list[str]], authors: list[str], here: str, seen_here: list[str], folder: str
) -> list[Finding]:
    """Every node sees the files of the others, and this machine's (`here`); `authors` are those that could write one."""
    remedy = f"mount the same file system at {folder} on all nodes and on this machine"
    if here in authors and any(here in notes for notes in seen.values()):
        apart = [node for node, notes in seen.items() if here not in notes]
        reference = "this machine"
    else:
        first = next(iter(seen))
        apart = [node for node, notes in seen.items() if first in authors and first not in notes]
        reference = first
    found = [
        Finding("shared run folder", "fail", f"{folder} is not the folder that {reference} sees", remedy, (node,))
        for node in apart
    ]
    unseen = [
        author
        for author in authors
        if author not in apart
        and author != here
        and any(author not in notes for node, notes in seen.items() if node not in apart)
    ]
    found += [
        Finding(
            "shared run folder", "fail", f"what it writes in {folder} is not seen on the other nodes", remedy, (node,)
        )
        for node in unseen
    ]
    if not found and set(authors) - set(seen_here) - {here}:
        found.append(
            Finding(
                "shared run folder",
                "warn",
                f"this machine does not see what the nodes write in {folder}",
                "look at the run from a node; supervise.py and report.py need that folder here",
            )
        )
    return found or [Finding("shared run folder", "ok", "every node sees the files of the others")]


def check_environment(
    local_env: Mapping[str, str], node_envs: Mapping[str, Mapping[str, str]], faults: list[str]
) -> list[Finding]:
    """Variables of this shell arrive at the nodes; `faults` are lines of .deepspeed_env that DeepSpeed cannot read.

    One that does not arrive is a warning: whether ranks take the wrong device or network without it, the other checks try.
    """
    found = []
    if faults:
        found.append(
            Finding(
                "environment",
                "fail",
                shorten_list(faults),
                "write KEY=VALUE lines only, without blank lines, comments and export",
            )
        )
    for name, value in local_env.items():
        there: dict[str, list[str]] = {}
        for node, values in node_envs.items():
            if values.get(name) != value:
                there.setdefault(f"{values[name]} there" if name in values else "not set there", []).append(node)
        for state, nodes in there.items():
            found.append(
                Finding(
                    "environment",
                    "warn",
                    f"{name}={value} here, {state}",
                    "write it to .deepspeed_env (--write-env does), or unset it here",
                    tuple(nodes),
                )
            )
    return found or [
        Finding("environment", "ok", f"{len(local_env)} variables of this shell that matter are the same on all nodes")
    ]


def check_launcher(pdsh: str | None) -> list[Finding]:
    """What DeepSpeed starts the nodes with stands on this machine."""
    return (
        []
        if pdsh
        else [
            Finding(
                "launcher",
                "fail",
                "pdsh is not installed on this machine",
                "apt install pdsh, or give deepspeed another --launcher",
            )
        ]
    )


def check_hostnames(facts: Facts, cuda: bool, chosen: bool) -> list[Finding]:
    """A node's own name does not mean its loopback, which gloo would tell the others to connect to; `chosen`: GLOO_SOCKET_IFNAME is set."""
    wrong = tuple(node for node, fact in facts.items() if fact["own"] is None or fact["own"].startswith("127."))
    if not wrong or chosen:
        return [
            Finding(
                "host names",
                "ok",
                "GLOO_SOCKET_IFNAME decides" if chosen else "no node takes its own name for its loopback",
            )
        ]
    return [
        Finding(
            "host names",
            "warn" if cuda else "fail",
            "its own name means no address that others can reach: gloo gives them that one",
            "correct /etc/hosts, or set GLOO_SOCKET_IFNAME in .deepspeed_env to the interface between the nodes",
            wrong,
        )
    ]


def check_rendezvous(
    first: str, address: str | None, port: int, held: dict[str, Any], tried: Mapping[str, dict[str, Any]]
) -> list[Finding]:
    """The port where the ranks meet is free on the first node, and the others can connect to it."""
    if address is None:
        return [
            Finding(
                "rendezvous",
                "fail",
                "hostname -I shows no address, which DeepSpeed needs",
                "give the node a network address",
                (first,),
            )
        ]
    if "error" in held:
        return [
            Finding(
                "rendezvous",
                "fail",
                f"port {port} is taken ({held['error']})",
                "end what listens there, or give deepspeed and doctor.py another --master_port",
                (first,),
            )
        ]
    found = [
        Finding(
            "rendezvous",
            "fail",
            f"cannot connect to {first} ({address}) at port {port}: {answer['error']}",
            f"open port {port} of {first} for the nodes, or give another --master_port; "
            "if the address is of another network, give deepspeed --master_addr",
            (node,),
        )
        for node, answer in tried.items()
        if "error" in answer
    ]
    return found or [
        Finding("rendezvous", "ok", f"{address}:{port} is free" + (", and reachable from all nodes" if tried else ""))
    ]


def check_node_pairs(pairs: Pairs) -> list[Finding]:
    """Every node reaches every other one, none much slower than the rest."""
    found = [
        Finding(
            "network",
            "fail",
            f"cannot connect to {pair['to']}: {pair['error']}",
            f"let the nodes reach all ports of each other; look at names, routes and the firewall of {pair['to']}",
            (pair["from"],),
        )
        for pair in pairs
        if "error" in pair
    ]
    measured = sorted((pair for pair in pairs if "error" not in pair), key=lambda pair: pair["bytes_per_second"])
    if not measured:
        return found
    worst, median = measured[0], measured[len(measured) // 2]["bytes_per_second"]
    latency = max(pair["latency_seconds"] for pair in measured)
    shown = f"slowest {worst['from']} -> {worst['to']}: {worst['bytes_per_second'] / 1e9:.2f} GB/s, round trip at most {latency * 1e3:.2f} ms"
    if len(measured) > 2 and worst["bytes_per_second"] < SLOW_PAIR * median:
        return [
            *found,
            Finding(
                "network",
                "warn",
                f"{shown}; the median is {median / 1e9:.2f} GB/s",
                "look at the link and its error counters: ethtool -S; every step waits for the slowest",
            ),
        ]
    return found or [Finding("network", "ok", f"{len(pairs)} directions; {shown}")]


def check_all_reduce(
    answers: Mapping[str, dict[str, Any]], measured: list[dict[str, Any]], bucket: int
) -> list[Finding]:
    """All ranks met and reduced a bucket of gradients."""
    found = []
    for node, answer in answers.items():
        errors = {"": answer["error"]} if "error" in answer else answer["errors"]
        if errors:
            rank, error = next(iter(errors.items()))
            found.append(
                Finding(
                    "all-reduce",
                    "fail",
                    (f"rank {rank}: " if rank else "") + error,
                    "mend what else is shown first; then choose the interface: GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME; "
                    "NCCL_DEBUG=INFO tells more",
                    (node,),
                )
            )
    if found or not measured:
        return found or [Finding("all-reduce", "fail", "rank 0 measured nothing", "ask again")]
    small, large = measured[0], measured[-1]
    what = (
        f"a bucket of {format_bytes(bucket)}"
        if large["bytes"] >= bucket
        else f"{format_bytes(large['bytes'])} (the bucket of {format_bytes(bucket)} would take long)"
    )
    return [
        Finding(
            "all-reduce",
            "ok",
            f"{small['ranks']} ranks: {what} in {large['seconds']:.3f} s, bus {large['bus_bytes_per_second'] / 1e9:.2f} "
            f"GB/s; {small['bytes']} bytes in {small['seconds'] * 1e3:.2f} ms",
        )
    ]
