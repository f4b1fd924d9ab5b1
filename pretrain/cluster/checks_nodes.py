"""Checks of the nodes themselves: pure functions from the facts of all nodes to findings. Facts come by node; `here` are those of this machine."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pretrain.cluster.agent_pool import CONNECTION_LOST
from pretrain.cluster.estimate import ResourceEstimate
from pretrain.cluster.findings import Finding, Level, format_bytes, shorten_list

Facts = Mapping[str, dict[str, Any]]
SKEW_WARN, SKEW_FAIL = 1.0, 30.0
"""Seconds. Builds and file systems compare times of change to the second; beyond the second, credentials and logs go wrong."""
SHM_GPU_FAIL, SHM_GPU_WARN = 64 * 2**20, 2**30
"""Free bytes of /dev/shm for ranks on several GPUs: NCCL passes data through it, and a container has 64 MiB unless told otherwise."""
SHM_CPU_WARN = 64 * 2**20
"""On CPU only processes of a preparation or a loader put anything there."""
LOCK_SECONDS = 600.0
"""Longer than the build of an op takes."""
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
"""Major version of the oldest NVIDIA driver for a major version of CUDA (CUDA Compatibility, "minor version compatibility")."""
TIGHT = 0.85
"""Of the memory, from which on an estimate is no comfort."""


def check_reachable(nodes: list[str], unreachable: Mapping[str, str]) -> list[Finding]:
    """All nodes answered."""
    found = [
        Finding("reached", "fail", reason, _remedy_of(reason, node), (node,)) for node, reason in unreachable.items()
    ]
    return found or [Finding("reached", "ok", f"{len(nodes)} node{'s' * (len(nodes) > 1)}: {shorten_list(nodes)}")]


def _remedy_of(reason: str, node: str) -> str:
    if "No module named" in reason:
        return f"make the environment and the project of this machine available under the same paths on {node}"
    if reason.startswith(CONNECTION_LOST):
        return f"look at {node}: it died, or its network did, while it was asked"
    if "answer" in reason and "`time`" not in reason:
        return f"look at {node}: a file system that hangs, or a machine at its limit; umount or remount it, or leave the node out of the hostfile"
    if "cd:" in reason or "not found" in reason or "No such file" in reason:
        return f"the working folder and the Python of this machine must exist on {node} under the same paths: mount or install them there"
    return f"`ssh {node} hostname` must work from here without a question: mend that, or leave the node out of the hostfile"


def check_identical(check: str, values: Mapping[str, Any], here: Any, seen: str, remedy: str) -> list[Finding]:
    """All nodes have one value. Where they do not, those are named that differ from this machine, or from most where this machine is no measure."""
    counts = Counter(values.values())
    if len(counts) <= 1:
        value = next(iter(counts), None)
        return [Finding(check, "ok", str(value))]
    usual = here if here in counts else counts.most_common(1)[0][0]
    return [
        Finding(
            check,
            "fail",
            f"{seen} {value}, {usual} elsewhere",
            remedy,
            tuple(node for node in values if values[node] == value),
        )
        for value in counts
        if value != usual
    ]


def check_python(facts: Facts, here: dict[str, Any]) -> list[Finding]:
    """One Python and one system."""
    found = check_identical(
        "python",
        {node: fact["python"] for node, fact in facts.items()},
        here["python"],
        "Python",
        "install the same Python there, and make the environment anew with it",
    )
    systems = Counter(f"{fact['system']}, {fact['libc']}" for fact in facts.values())
    if len(systems) == 1:
        return [*found, Finding("system", "ok", next(iter(systems)))]
    return [
        *found,
        Finding(
            "system",
            "warn",
            "; ".join(f"{system} on {count}" for system, count in systems.items()),
            "compiled packages may not load on all of these: use one system image, and an extension folder for each",
        ),
    ]


def check_packages(facts: Facts) -> list[Finding]:
    """The versions of requirements.lock, and the same everywhere."""
    found: list[Finding] = []
    locked = next(fact["locked"] for fact in facts.values())
    common = _common([fact["installed"] for fact in facts.values()], locked)
    install = "pip install -r requirements.lock, in the environment of that node"
    for node, fact in facts.items():
        installed = fact["installed"]
        other = [
            f"{name} {installed.get(name, 'is missing')} instead of {version}"
            for name, version in common.items()
            if installed.get(name) != version
        ]
        other += [
            f"{name} {version}, which the others lack" for name, version in installed.items() if name not in common
        ]
        missing = [name for name in fact["required"] if name not in installed and name not in common]
        if other:
            found.append(Finding("packages", "fail", shorten_list(other), install, (node,)))
        if missing:
            found.append(Finding("packages", "fail", f"{shorten_list(missing)} not installed", install, (node,)))
    unlike = [
        f"{name} {version}, locked is {locked[name]}"
        for name, version in common.items()
        if version.split("+")[0] != locked[name]
    ]
    if unlike:
        found.append(
            Finding(
                "packages",
                "warn",
                f"on all nodes: {shorten_list(unlike)}",
                "pip install -r requirements.lock, or try the run on a few steps first",
            )
        )
    return found or [
        Finding(
            "packages",
            "ok",
            f"{len(common)} as in requirements.lock" if locked else "no requirements.lock to compare with",
        )
    ]


def _common(installed: list[dict[str, str]], locked: dict[str, str]) -> dict[str, str]:
    """The version of each package that nodes should have: the locked one, where any node has it, or else what most have."""
    counted = {}
    for name in sorted({name for one in installed for name in one}):
        counts = Counter(one.get(name) for one in installed)
        counted[name] = next(
            (version for version in counts if version and version.split("+")[0] == locked[name]),
            counts.most_common(1)[0][0],
        )
    return {name: version for name, version in counted.items() if version is not None}


def check_code(facts: Facts, here: dict[str, Any]) -> list[Finding]:
    """The same Python files of the project, whatever git says."""
    found = []
    for node, fact in facts.items():
        names = here["files"].keys() | fact["files"].keys()
        differing = sorted(name for name in names if here["files"].get(name) != fact["files"].get(name))
        if differing:
            revision = (
                ""
                if fact["revision"] == here["revision"]
                else f" (revision {fact['revision']}, {here['revision']} here)"
            )
            found.append(
                Finding(
                    "code",
                    "fail",
                    f"other than here: {shorten_list(differing)}{revision}",
                    "bring the node to the same revision, or share the project's folder",
                    (node,),
                )
            )
    return found or [Finding("code", "ok", f"{len(here['files'])} files, revision {here['revision'] or 'unknown'}")]


def check_clock(offsets: Mapping[str, float]) -> list[Finding]:
    """Clocks against this machine's, seconds."""
    found = []
    for node, offset in offsets.items():
        if abs(offset) > SKEW_WARN:
            level: Level = "fail" if abs(offset) > SKEW_FAIL else "warn"
            found.append(
                Finding(
                    "clock",
                    level,
                    f"{abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} this machine",
                    "synchronise it: chronyc makestep, or systemctl restart systemd-timesyncd",
                    (node,),
                )
            )
    return found or [Finding("clock", "ok", f"within {max(map(abs, offsets.values()), default=0.0):.3f} s")]


def check_shared_memory(facts: Facts, slots: Mapping[str, int], cuda: bool) -> list[Finding]:
    """/dev/shm is there and large enough."""
    found = []
    for node, fact in facts.items():
        free, gpus = fact["shm_free"], cuda and slots[node] > 1
        if free < (SHM_GPU_WARN if gpus else SHM_CPU_WARN):
            level: Level = "fail" if gpus and free < SHM_GPU_FAIL else "warn"
            reason = (
                "NCCL passes data between the GPUs of a node through it"
                if gpus
                else "processes of a preparation share data through it"
            )
            found.append(
                Finding(
                    "shared memory",
                    level,
                    f"/dev/shm has {format_bytes(free)} free: {reason}",
                    "enlarge it: mount -o remount,size=8G /dev/shm; in a container --shm-size=8g",
                    (node,),
                )
            )
    return found or [
        Finding(
            "shared memory",
            "ok",
            f"/dev/shm has at least {format_bytes(min(fact['shm_free'] for fact in facts.values()))} free",
        )
    ]


def check_devices(facts: Facts, slots: Mapping[str, int], chosen: str | None = None) -> list[Finding]:
    """One kind of device, as many as slots, and none in use; `chosen` is DS_ACCELERATOR of this shell."""
    found = [
        Finding("devices", "fail", fact["driver_fault"], "mend the driver: nvidia-smi must work there", (node,))
        for node, fact in facts.items()
        if "driver_fault" in fact
    ]
    accelerators = {node: fact["accelerator"] for node, fact in facts.items()}
    if other := tuple(node for node, accelerator in accelerators.items() if chosen and accelerator != chosen):
        return [
            *found,
            Finding(
                "devices",
                "fail",
                f"DeepSpeed takes {accelerators[other[0]]}, DS_ACCELERATOR is {chosen} here",
                "write DS_ACCELERATOR to .deepspeed_env (--write-env does), or unset it here",
                other,
            ),
        ]
    if len(set(accelerators.values())) > 1:
        return found + check_identical(
            "devices",
            accelerators,
            None,
            "DeepSpeed takes",
            "set DS_ACCELERATOR alike, or leave nodes without GPUs out",
        )
    if set(accelerators.values()) != {"cuda"}:
        return found or [
            Finding("devices", "ok", f"{next(iter(accelerators.values()), 'cpu')}, {sum(slots.values())} ranks")
        ]
    for node, fact in facts.items():
        if len(fact["gpus"]) < slots[node]:
            found.append(
                Finding(
                    "devices",
                    "fail",
                    f"{len(fact['gpus'])} GPUs for {slots[node]} slots",
                    "correct slots= in the hostfile, or look for a GPU that is lost: nvidia-smi, dmesg",
                    (node,),
                )
            )
        found += _check_driver(node, fact)
        taken = [
            f"GPU {place} has {format_bytes(gpu['used'])} of {format_bytes(gpu['memory'])} taken"
            for place, gpu in enumerate(fact["gpus"])
            if gpu["used"] > gpu["memory"] / 20
        ]
        if taken:
            found.append(
                Finding(
                    "devices", "warn", shorten_list(taken), "end the processes that nvidia-smi shows there", (node,)
                )
            )
    kinds = {
        node: ", ".join(sorted({f"{gpu['name']} {format_bytes(gpu['memory'])}" for gpu in fact["gpus"]}))
        for node, fact in facts.items()
    }
    drivers = {node: ", ".join(sorted({gpu["driver"] for gpu in fact["gpus"]})) for node, fact in facts.items()}
    for values, remedy in (
        (kinds, "put like GPUs into one run: the slowest sets the pace, the smallest the memory"),
        (drivers, "install one driver version on all nodes"),
    ):
        found += [item for item in check_identical("devices", values, None, "has", remedy) if item.level != "ok"]
    return found or [
        Finding(
            "devices",
            "ok",
            f"{sum(slots.values())} x {next(iter(kinds.values()))}, driver {next(iter(drivers.values()))}",
        )
    ]


def _check_driver(node: str, fact: dict[str, Any]) -> list[Finding]:
    """Torch was built for CUDA, and the driver of the node is new enough for that build."""
    if fact["torch_cuda"] is None:
        return [
            Finding(
                "devices", "fail", "torch was built without CUDA", "install the build of torch for CUDA there", (node,)
            )
        ]
    oldest = OLDEST_DRIVERS.get(int(fact["torch_cuda"].split(".")[0]), 0)
    drivers = sorted({gpu["driver"] for gpu in fact["gpus"] if int(gpu["driver"].split(".")[0]) < oldest})
    return [
        Finding(
            "devices",
            "fail",
            f"driver {driver} is too old for torch, which was built for CUDA {fact['torch_cuda']}",
            f"install driver {oldest} or newer there, or a build of torch for an older CUDA",
            (node,),
        )
        for driver in drivers
    ]


def check_extensions(facts: Facts, cuda: bool, compiles: bool) -> list[Finding]:
    """No build of an op that was killed, whose lock every later build waits for; and what the run needs to compile its layers or FlexAttention.

    FlexAttention is compiled on CUDA whatever train.compile says: by Triton, which needs a C compiler and the header of Python.
    """
    found = []
    for node, fact in facts.items():
        stale = [lock for lock in fact["locks"] if not fact["compiling"] and lock["age"] > LOCK_SECONDS]
        for lock in stale:
            seen = (
                f"{lock['path']} is {lock['age'] / 60:.0f} min old and nothing compiles there: whatever builds or loads that op waits for ever, "
                "without a word" + ("" if cuda else " (this project's runs on CPU load none)")
            )
            found.append(Finding("compiled ops", "fail" if cuda else "warn", seen, f"rm {lock['path']}", (node,)))
        if compiles and not fact["compiler"]:
            found.append(
                Finding(
                    "compiled ops",
                    "fail",
                    "no C++ compiler, which train.compile needs",
                    "apt install g++, or train.compile=false",
                    (node,),
                )
            )
        if cuda and not (fact["c_compiler"] and fact["python_header"]):
            missing = " and no ".join(
                name
                for name, there in (("C compiler", fact["c_compiler"]), ("Python.h", fact["python_header"]))
                if not there
            )
            found.append(
                Finding(
                    "compiled ops",
                    "fail",
                    f"no {missing}, which compiling FlexAttention on CUDA needs",
                    "apt install gcc python3-dev, or model.attention=sdpa, which is slower",
                    (node,),
                )
            )
        if young := [lock["path"] for lock in fact["locks"] if lock not in stale]:
            found.append(
                Finding(
                    "compiled ops",
                    "warn",
                    f"an op is being built: {shorten_list(young)}",
                    "wait until it is there, then ask again",
                    (node,),
                )
            )
    ops = sorted({op for fact in facts.values() for op in fact["ops"]})
    return found or [
        Finding("compiled ops", "ok", f"{shorten_list(ops)} built, no lock" if ops else "none built, no lock")
    ]


def check_memory(facts: Facts, devices: Facts, slots: Mapping[str, int], estimate: ResourceEstimate) -> list[Finding]:
    """What a rank needs against what its node has for each."""
    found, least = [], float("inf")
    for node in facts.keys() & devices.keys():
        cuda = devices[node]["accelerator"] == "cuda" and devices[node]["gpus"]
        room = min(gpu["memory"] for gpu in devices[node]["gpus"]) if cuda else facts[node]["available"] / slots[node]
        need = estimate.rank_memory["cuda" if cuda else "cpu"]
        what = "of its GPU" if cuda else f"of host memory for each of {slots[node]} ranks"
        least = min(least, room)
        if need > TIGHT * room and not estimate.offloads:
            found.append(
                Finding(
                    "memory",
                    "fail" if need > room else "warn",
                    f"a rank needs about {format_bytes(need)}, {format_bytes(room)} {what}",
                    "more ranks, train.micro_batch_rows=1, train.activation_checkpointing=true, a smaller "
                    "deepspeed.zero_optimization.reduce_bucket_size, or a smaller model; run.py --dry-run shows the parts",
                    (node,),
                )
            )
    if estimate.offloads:
        return [
            Finding(
                "memory",
                "warn",
                "not compared: with offloading, part of it lies elsewhere",
                "watch the memory in the first steps of the run",
            )
        ]
    device = "cuda" if any(fact["accelerator"] == "cuda" for fact in devices.values()) else "cpu"
    return found or [
        Finding(
            "memory",
            "ok",
            f"a rank needs about {format_bytes(estimate.rank_memory[device])}, and has {format_bytes(least)}",
        )
    ]
