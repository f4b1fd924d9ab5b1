"""Checks of the devices of the nodes: the kind of accelerator, GPUs, drivers, and the memory that GPUs share."""

from collections.abc import Mapping
from typing import Any

from pretrain.cluster.findings import Facts, Finding, Level, check_identical, format_bytes, shorten_list

SHM_GPU_FAIL, SHM_GPU_WARN = 64 * 2**20, 2**30
"""Minimum free bytes of /dev/shm for ranks on several GPUs. Less is a failure, or a warning.

NCCL passes data through /dev/shm. A container has 64 MiB by default.
"""
SHM_CPU_WARN = 64 * 2**20
"""Minimum free bytes of /dev/shm on CPU, where only the processes of a preparation or a loader use it."""
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
"""Major version of the oldest NVIDIA driver that works with each major version of CUDA.

Source: CUDA Compatibility, "minor version compatibility".
"""
IN_USE = 0.05
"""Fraction of a GPU's memory above which the GPU counts as in use."""


def check_devices(facts: Facts, slots: Mapping[str, int], chosen: str | None = None) -> list[Finding]:
    """Check that all nodes have the same kind of device, one for each slot, and that no device is in use.

    `chosen` is the value of DS_ACCELERATOR in this shell.
    """
    findings = [
        Finding(
            "devices", "fail", node_facts["driver_fault"], "fix the driver: nvidia-smi must work on the node", (node,)
        )
        for node, node_facts in facts.items()
        if "driver_fault" in node_facts
    ]
    accelerators = {node: node_facts["accelerator"] for node, node_facts in facts.items()}
    if differing := _check_accelerators(accelerators, chosen):
        return findings + differing
    if set(accelerators.values()) != {"cuda"}:
        return findings or [
            Finding("devices", "ok", f"{sum(slots.values())} ranks on {next(iter(accelerators.values()), 'cpu')}")
        ]
    for node, node_facts in facts.items():
        findings += _check_gpus(node, node_facts, slots[node])
    kinds = {
        node: ", ".join(sorted({f"{gpu['name']} {format_bytes(gpu['memory'])}" for gpu in node_facts["gpus"]}))
        for node, node_facts in facts.items()
    }
    drivers = {
        node: ", ".join(sorted({gpu["driver"] for gpu in node_facts["gpus"]})) for node, node_facts in facts.items()
    }
    for values, remedy in (
        (kinds, "use GPUs of one kind: the slowest one limits the speed, and the smallest one the memory"),
        (drivers, "install one driver version on all nodes"),
    ):
        findings += [item for item in check_identical("devices", values, None, "has", remedy) if item.level != "ok"]
    return findings or [
        Finding(
            "devices",
            "ok",
            f"{sum(slots.values())} x {next(iter(kinds.values()))}, driver {next(iter(drivers.values()))}",
        )
    ]


def _check_accelerators(accelerators: Mapping[str, str], chosen: str | None) -> list[Finding]:
    """Check that DeepSpeed uses the same accelerator on all nodes, the chosen one if there is one."""
    if differing := tuple(node for node, accelerator in accelerators.items() if chosen and accelerator != chosen):
        return [
            Finding(
                "devices",
                "fail",
                f"DeepSpeed uses {accelerators[differing[0]]}, but DS_ACCELERATOR is {chosen} on this machine",
                "write DS_ACCELERATOR to .deepspeed_env (with --write-env), or unset it on this machine",
                differing,
            )
        ]
    if len(set(accelerators.values())) <= 1:
        return []
    remedy = "set DS_ACCELERATOR to the same value on all nodes, or remove the nodes without GPUs"
    return check_identical("devices", accelerators, None, "DeepSpeed uses", remedy)


def _check_gpus(node: str, node_facts: dict[str, Any], slots: int) -> list[Finding]:
    """Check the GPUs of a node: their number, their driver, and whether they are in use."""
    findings = []
    if len(node_facts["gpus"]) < slots:
        findings.append(
            Finding(
                "devices",
                "fail",
                f"{len(node_facts['gpus'])} GPUs for {slots} slots",
                "correct slots= in the hostfile, or look for a missing GPU with nvidia-smi and dmesg",
                (node,),
            )
        )
    findings += _check_driver(node, node_facts)
    in_use = [
        f"GPU {index} has {format_bytes(gpu['used'])} of {format_bytes(gpu['memory'])} in use"
        for index, gpu in enumerate(node_facts["gpus"])
        if gpu["used"] > IN_USE * gpu["memory"]
    ]
    if in_use:
        remedy = "end the processes that nvidia-smi shows on the node"
        findings.append(Finding("devices", "warn", shorten_list(in_use), remedy, (node,)))
    return findings


def _check_driver(node: str, node_facts: dict[str, Any]) -> list[Finding]:
    """Check that torch was built for CUDA, and that the driver of the node is new enough for that build."""
    if node_facts["torch_cuda"] is None:
        return [
            Finding(
                "devices", "fail", "torch was built without CUDA", "install a CUDA build of torch on the node", (node,)
            )
        ]
    oldest = OLDEST_DRIVERS.get(int(node_facts["torch_cuda"].split(".")[0]), 0)
    drivers = sorted({gpu["driver"] for gpu in node_facts["gpus"] if int(gpu["driver"].split(".")[0]) < oldest})
    return [
        Finding(
            "devices",
            "fail",
            f"driver {driver} is too old: torch was built for CUDA {node_facts['torch_cuda']}",
            f"install driver {oldest} or newer on the node, or a build of torch for an older CUDA",
            (node,),
        )
        for driver in drivers
    ]


def check_shared_memory(facts: Facts, slots: Mapping[str, int], cuda: bool) -> list[Finding]:
    """Check that /dev/shm exists and is large enough."""
    findings = []
    for node, node_facts in facts.items():
        free, gpus = node_facts["shm_free"], cuda and slots[node] > 1
        if free < (SHM_GPU_WARN if gpus else SHM_CPU_WARN):
            level: Level = "fail" if gpus and free < SHM_GPU_FAIL else "warn"
            reason = (
                "NCCL passes data between the GPUs of a node through it"
                if gpus
                else "the processes of a preparation share data through it"
            )
            findings.append(
                Finding(
                    "shared memory",
                    level,
                    f"/dev/shm has {format_bytes(free)} free: {reason}",
                    "enlarge it: mount -o remount,size=8G /dev/shm, or start the container with --shm-size=8g",
                    (node,),
                )
            )
    return findings or [
        Finding(
            "shared memory",
            "ok",
            f"/dev/shm has at least {format_bytes(min(node_facts['shm_free'] for node_facts in facts.values()))} free",
        )
    ]
