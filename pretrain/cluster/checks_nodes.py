"""Checks of individual nodes: pure functions that turn the facts of all nodes into findings.

`facts` maps node names to facts, and `local_facts` are the facts of this machine. They come from facts.py. The checks
of devices are in checks_devices.py. `CHECKS` at the end lists the checks of each topic.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.cluster.agent_pool import CONNECTION_LOST
from pretrain.cluster.checks_devices import check_devices, check_shared_memory
from pretrain.cluster.estimate import ResourceEstimate
from pretrain.cluster.findings import Facts, Finding, Level, check_identical, format_bytes, shorten_list
from pretrain.config import RunConfig

SKEW_WARN, SKEW_FAIL = 1.0, 30.0
"""Limits of the clock offset, in seconds.

Build tools and file systems compare modification times to the second. Above the second limit, credentials may be
rejected and logs are misleading.
"""
LOCK_SECONDS = 600.0
"""Age above which a lock counts as stale, in seconds. No build of an op takes that long."""
TIGHT = 0.85
"""Fraction of the memory above which an estimate causes a warning."""


@dataclass(frozen=True)
class DiagnosedRun:
    """The run and its nodes, which a check may use in addition to the facts of its topic."""

    config: RunConfig
    slots: Mapping[str, int]
    """Number of ranks of each node that answers."""
    cuda: bool
    """Whether the ranks use GPUs."""
    estimate: ResourceEstimate | None
    """Resources that the run needs; None if they cannot be estimated."""
    facts: Mapping[str, Facts]
    """The facts of all topics."""
    local_facts: Callable[[str], dict[str, Any]]
    """Function that collects the facts of a topic on this machine."""


Check = Callable[[Facts, DiagnosedRun], list[Finding]]
"""Check of the facts of one topic, for all nodes that could collect them."""


def check_reachable(nodes: list[str], unreachable: Mapping[str, str]) -> list[Finding]:
    """Check that all nodes answered."""
    findings = [
        Finding("reached", "fail", reason, _reachability_remedy(reason, node), (node,))
        for node, reason in unreachable.items()
    ]
    return findings or [Finding("reached", "ok", f"{len(nodes)} node{'s' * (len(nodes) > 1)}: {shorten_list(nodes)}")]


def _reachability_remedy(reason: str, node: str) -> str:
    if "No module named" in reason:
        return f"make the environment and the project of this machine available under the same paths on {node}"
    if reason.startswith(CONNECTION_LOST):
        return f"inspect {node}: the node or its network failed during the checks"
    if "answer" in reason and "`time`" not in reason:  # no answer in time to a call after the first one, `time`
        return (
            f"inspect {node} for a hanging file system or an overloaded machine: "
            "unmount or remount the file system, or remove the node from the hostfile"
        )
    if "cd:" in reason or "not found" in reason or "No such file" in reason:
        return (
            f"make the working folder and the Python of this machine available on {node} under the same paths: "
            "mount or install them there"
        )
    return f"make `ssh {node} hostname` work from this machine without a prompt, or remove the node from the hostfile"


def check_python(facts: Facts, local_facts: dict[str, Any]) -> list[Finding]:
    """Check that all nodes have the same Python version, operating system and C library."""
    findings = check_identical(
        "python",
        {node: node_facts["python"] for node, node_facts in facts.items()},
        local_facts["python"],
        "Python",
        "install the same Python on the node, and create the environment again with it",
    )
    systems = Counter(f"{node_facts['system']}, {node_facts['libc']}" for node_facts in facts.values())
    if len(systems) == 1:
        return [*findings, Finding("system", "ok", next(iter(systems)))]
    return [
        *findings,
        Finding(
            "system",
            "warn",
            "; ".join(f"{system} on {count} node{'s' * (count > 1)}" for system, count in systems.items()),
            "use one system image, and a separate extension folder for each system: "
            "compiled packages may not load on all of them",
        ),
    ]


def check_packages(facts: Facts) -> list[Finding]:
    """Check that all nodes have the same package versions, and that these are the versions of requirements.lock."""
    findings: list[Finding] = []
    locked = next(node_facts["locked"] for node_facts in facts.values())
    common = _expected_versions([node_facts["installed"] for node_facts in facts.values()], locked)
    install = "pip install -r requirements.lock, in the environment of that node"
    for node, node_facts in facts.items():
        installed = node_facts["installed"]
        differing = [
            f"{name} {installed[name]} instead of {version}" if name in installed else f"{name} {version} is missing"
            for name, version in common.items()
            if installed.get(name) != version
        ]
        differing += [
            f"{name} {version}, which the other nodes lack" for name, version in installed.items() if name not in common
        ]
        missing = [name for name in node_facts["required"] if name not in installed and name not in common]
        if differing:
            findings.append(Finding("packages", "fail", shorten_list(differing), install, (node,)))
        if missing:
            findings.append(Finding("packages", "fail", f"{shorten_list(missing)} not installed", install, (node,)))
    unlocked = [
        f"{name} {version} instead of {locked[name]} of requirements.lock"
        for name, version in common.items()
        if version.split("+")[0] != locked[name]
    ]
    if unlocked:
        findings.append(
            Finding(
                "packages",
                "warn",
                f"on all nodes: {shorten_list(unlocked)}",
                "pip install -r requirements.lock, or first try the run with a few steps",
            )
        )
    return findings or [
        Finding(
            "packages",
            "ok",
            f"{len(common)} packages as in requirements.lock" if locked else "no requirements.lock to compare with",
        )
    ]


def _expected_versions(installed: list[dict[str, str]], locked: dict[str, str]) -> dict[str, str]:
    """Return the version of each package that all nodes should have.

    This is the locked version if any node has it, else the most common one.
    """
    expected = {}
    for name in sorted({name for packages in installed for name in packages}):
        counts = Counter(packages.get(name) for packages in installed)
        expected[name] = next(
            (version for version in counts if version and version.split("+")[0] == locked[name]),
            counts.most_common(1)[0][0],
        )
    return {name: version for name, version in expected.items() if version is not None}


def check_code(facts: Facts, local_facts: dict[str, Any]) -> list[Finding]:
    """Check that the Python files of the project are the same on all nodes, by comparing hashes."""
    findings = []
    for node, node_facts in facts.items():
        names = local_facts["files"].keys() | node_facts["files"].keys()
        differing = sorted(name for name in names if local_facts["files"].get(name) != node_facts["files"].get(name))
        if differing:
            revision = (
                ""
                if node_facts["revision"] == local_facts["revision"]
                else f" (revision {node_facts['revision']}; this machine has {local_facts['revision']})"
            )
            findings.append(
                Finding(
                    "code",
                    "fail",
                    f"differs from this machine: {shorten_list(differing)}{revision}",
                    "check out the same revision on the node, or share the project's folder",
                    (node,),
                )
            )
    return findings or [
        Finding("code", "ok", f"{len(local_facts['files'])} files, revision {local_facts['revision'] or 'unknown'}")
    ]


def check_clock(offsets: Mapping[str, float]) -> list[Finding]:
    """Check the clock offsets of the nodes against this machine, in seconds."""
    findings = []
    for node, offset in offsets.items():
        if abs(offset) > SKEW_WARN:
            level: Level = "fail" if abs(offset) > SKEW_FAIL else "warn"
            findings.append(
                Finding(
                    "clock",
                    level,
                    f"{abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} this machine",
                    "synchronise it: chronyc makestep, or systemctl restart systemd-timesyncd",
                    (node,),
                )
            )
    return findings or [Finding("clock", "ok", f"within {max(map(abs, offsets.values()), default=0.0):.3f} s")]


def check_extensions(facts: Facts, cuda: bool, compiles: bool) -> list[Finding]:
    """Check for stale locks of op builds, and for the compilers that the run needs.

    A killed build leaves its lock, and every later build waits for it. FlexAttention is compiled on CUDA even with
    train.compile=false. Triton compiles it, and needs a C compiler and Python.h.
    """
    findings = []
    for node, node_facts in facts.items():
        stale = [lock for lock in node_facts["locks"] if not node_facts["compiling"] and lock["age"] > LOCK_SECONDS]
        for lock in stale:
            seen = (
                f"{lock['path']} is {lock['age'] / 60:.0f} min old and no compiler is running: "
                "a process that builds or loads that op hangs silently"
                + ("" if cuda else " (runs of this project on CPU load no ops)")
            )
            findings.append(Finding("compiled ops", "fail" if cuda else "warn", seen, f"rm {lock['path']}", (node,)))
        if compiles and not node_facts["compiler"]:
            findings.append(
                Finding(
                    "compiled ops",
                    "fail",
                    "no C++ compiler: train.compile needs one",
                    "apt install g++, or set train.compile=false",
                    (node,),
                )
            )
        if cuda and not (node_facts["c_compiler"] and node_facts["python_header"]):
            missing = " and no ".join(
                name
                for name, available in (
                    ("C compiler", node_facts["c_compiler"]),
                    ("Python.h", node_facts["python_header"]),
                )
                if not available
            )
            findings.append(
                Finding(
                    "compiled ops",
                    "fail",
                    f"no {missing}: needed to compile FlexAttention on CUDA",
                    "apt install gcc python3-dev, or set model.attention=sdpa (slower)",
                    (node,),
                )
            )
        if recent := [lock["path"] for lock in node_facts["locks"] if lock not in stale]:
            findings.append(
                Finding(
                    "compiled ops",
                    "warn",
                    f"an op seems to be being built; lock files: {shorten_list(recent)}",
                    "wait until the build has finished, then run doctor.py again",
                    (node,),
                )
            )
    ops = sorted({op for node_facts in facts.values() for op in node_facts["ops"]})
    return findings or [
        Finding("compiled ops", "ok", f"{shorten_list(ops)} built, no lock" if ops else "no op built, no lock")
    ]


def check_memory(facts: Facts, devices: Facts, slots: Mapping[str, int], estimate: ResourceEstimate) -> list[Finding]:
    """Check the estimated memory of a rank against the memory available to it on its node."""
    findings = []
    smallest_room = float("inf")
    for node in facts.keys() & devices.keys():
        cuda = devices[node]["accelerator"] == "cuda" and devices[node]["gpus"]
        room = min(gpu["memory"] for gpu in devices[node]["gpus"]) if cuda else facts[node]["available"] / slots[node]
        need = estimate.rank_memory["cuda" if cuda else "cpu"]
        place = "on its GPU" if cuda else f"of host memory ({slots[node]} ranks share the node's)"
        smallest_room = min(smallest_room, room)
        if need > TIGHT * room and not estimate.offloads:
            findings.append(
                Finding(
                    "memory",
                    "fail" if need > room else "warn",
                    f"a rank needs about {format_bytes(need)} and has {format_bytes(room)} {place}",
                    "use more ranks, train.micro_batch_rows=1, train.activation_checkpointing=true, a smaller "
                    "deepspeed.zero_optimization.reduce_bucket_size or a smaller model; "
                    "run.py --dry-run shows the parts of the estimate",
                    (node,),
                )
            )
    if estimate.offloads:
        return [
            Finding(
                "memory",
                "warn",
                "the estimate was not checked: with offloading, part of the memory is on the host or on disk",
                "watch the memory during the first steps of the run",
            )
        ]
    device = "cuda" if any(node_facts["accelerator"] == "cuda" for node_facts in devices.values()) else "cpu"
    return findings or [
        Finding(
            "memory",
            "ok",
            f"a rank needs about {format_bytes(estimate.rank_memory[device])} and has {format_bytes(smallest_room)}",
        )
    ]


def _check_memory_of_ranks(facts: Facts, run: DiagnosedRun) -> list[Finding]:
    return check_memory(facts, run.facts["devices"], run.slots, run.estimate) if run.estimate else []


CHECKS: dict[str, list[Check]] = {
    "python_and_system": [lambda facts, run: check_python(facts, run.local_facts("python_and_system"))],
    "packages": [lambda facts, run: check_packages(facts)],
    "code": [lambda facts, run: check_code(facts, run.local_facts("code"))],
    "devices": [lambda facts, run: check_devices(facts, run.slots, os.environ.get("DS_ACCELERATOR"))],
    "memory": [lambda facts, run: check_shared_memory(facts, run.slots, run.cuda), _check_memory_of_ranks],
    "extensions": [lambda facts, run: check_extensions(facts, run.cuda, run.config.train.compile)],
}
"""Checks by the topic of facts.py whose facts they need."""
