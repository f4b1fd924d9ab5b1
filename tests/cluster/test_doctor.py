"""The doctor finds problems of the nodes before a run starts, and does not report a problem for two healthy nodes."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.pipeline import prepare
from data_prep.utils.console import UserError
from data_prep.utils.files import try_lock
from pretrain.cluster import checks_devices, checks_nodes, checks_run, environment, facts, network
from pretrain.cluster.estimate import ResourceEstimate
from pretrain.cluster.findings import Finding
from pretrain.cluster.hosts import Host, read_hostfile, slurm_hosts
from pretrain.config import load_config
from tests.cluster.nodes import NODES, Cluster
from tests.commands import ROOT, free_port, run_command, tiny_config, write_config
from tests.processes import TIMEOUT

DOCTOR = ROOT / "launcher" / "doctor.py"
GIB = 2**30
LONG_TIMEOUTS = f"""
import sys

if any(word.endswith("doctor.py") for word in sys.orig_argv):
    from pretrain.cluster import diagnosis
    diagnosis.START_TIMEOUT_SECONDS = diagnosis.FACT_SECONDS = diagnosis.REDUCE_SECONDS = {TIMEOUT}
"""
"""A sitecustomize.py with which the doctor waits longer for slow nodes and ranks."""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Return the configuration of a tiny run, in its own folder with its prepared corpus."""
    folder = tmp_path_factory.mktemp("doctor")
    path = write_config(folder, tiny_config(folder, train__global_batch_rows=12, train__micro_batch_rows=2))
    (folder / "runs").mkdir()
    (folder / "extensions").mkdir()
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(LONG_TIMEOUTS)
    (folder / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    prepare(load_config(path).data)
    return path


@pytest.fixture
def doctor(nodes: Cluster, config: Path) -> Callable[..., tuple[int, dict]]:
    """Return a function that runs the doctor on the control host and returns its exit code and report."""

    def doctor(*arguments: str, hostfile: str = "hosts", **more: str) -> tuple[int, dict]:
        folder = config.parent
        (folder / ".deepspeed_env").unlink(missing_ok=True)
        if (folder / "prepared_env").exists():
            shutil.copy(folder / "prepared_env", folder / ".deepspeed_env")
        completed = nodes.run_on_control(
            [sys.executable, DOCTOR, config.name, "--hostfile", hostfile, "--json", *arguments],
            check=False,
            cwd=folder,
            PYTHONPATH=f"{ROOT}{os.pathsep}{folder / 'site'}",
            HOME=str(folder),
            TORCH_EXTENSIONS_DIR=str(folder / "extensions"),
            **more,
        )
        assert completed.returncode in (0, 1) and "Traceback" not in completed.stderr, completed.stderr
        assert not [name for name in os.listdir(folder) + os.listdir(folder / "runs") if name.startswith(".doctor")]
        return completed.returncode, json.loads(completed.stdout)

    return doctor


@pytest.fixture
def cleanups():
    """Yield a list of functions to call in reverse order after the test."""
    actions: list[Callable[[], object]] = []
    yield actions
    for action in reversed(actions):
        action()


def bind_mount(nodes: Cluster, node: str, original: Path, changed: Path, cleanups: list) -> None:
    """Mount the changed file or folder over the original one, on one node only."""
    nodes.run_on_node(node, ["mount", "--bind", changed, original])
    cleanups.append(lambda: nodes.run_on_node(node, ["umount", original]))


def mount_tmpfs(nodes: Cluster, node: str, folder: Path, size: str, cleanups: list) -> None:
    nodes.run_on_node(node, ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder])
    cleanups.append(lambda: nodes.run_on_node(node, ["umount", folder]))


def drop_packets(nodes: Cluster, node: str, *rule: str, cleanups: list) -> None:
    """Make a node's firewall drop the incoming packets that match the rule."""
    nodes.run_on_node(node, ["iptables", "-A", "INPUT", *rule, "-j", "DROP"])
    cleanups.append(lambda: nodes.run_on_node(node, ["iptables", "-D", "INPUT", *rule, "-j", "DROP"]))


def expect(report: dict, check: str, level: str, node: str | None, seen: str) -> None:
    """Assert that a finding with a remedy reports this problem for this node only."""
    found = [
        finding
        for finding in report["findings"]
        if finding["check"] == check
        and finding["level"] == level
        and finding["nodes"] == ([node] if node else [])
        and re.search(seen, finding["seen"])
    ]
    assert found and all(finding["remedy"] for finding in found), (
        check,
        level,
        node,
        seen,
        [finding for finding in report["findings"] if finding["level"] != "ok"],
    )


def changed_copy(path: Path, folder: Path, old: bytes, new: bytes) -> Path:
    copy = folder / path.name
    assert old in path.read_bytes()
    copy.write_bytes(path.read_bytes().replace(old, new, 1))
    return copy


def test_two_healthy_nodes_pass(doctor, nodes, config):
    code, report = doctor("--write-env")
    assert code == 0 and report["counts"]["fail"] == report["counts"]["warn"] == 0, [
        finding for finding in report["findings"] if finding["level"] != "ok"
    ]
    assert {(pair["from"], pair["to"]) for pair in report["measurements"]["pairs"]} == {("n1", "n2"), ("n2", "n1")}
    assert all(pair["bytes_per_second"] > 0 and pair["latency_seconds"] > 0 for pair in report["measurements"]["pairs"])
    all_reduces = report["measurements"]["all_reduce"]
    sizes = [measured["bytes"] for measured in all_reduces]
    assert sizes == sorted(sizes) and len(sizes) > 1
    assert all(measured["ranks"] == 2 and measured["seconds"] > 0 for measured in all_reduces)
    written = (config.parent / ".deepspeed_env").read_text().splitlines()
    assert "DS_ACCELERATOR=cpu" in written and "OMP_NUM_THREADS=1" in written
    for node in NODES:
        assert "pretrain.cluster" not in nodes.run_on_node(node, ["ps", "axww"]).stdout


def test_all_faults_of_one_node_are_reported_together(doctor, nodes, config, tmp_path, cleanups):
    folder = config.parent
    tqdm = importlib.metadata.distribution("tqdm")
    metadata = Path(tqdm.locate_file(next(file for file in tqdm.files if file.name == "METADATA")))
    bind_mount(
        nodes,
        "n2",
        metadata,
        changed_copy(metadata, tmp_path, f"Version: {tqdm.version}".encode(), b"Version: 1.2.3"),
        cleanups,
    )
    source = ROOT / "pretrain" / "objectives" / "base.py"
    bind_mount(nodes, "n2", source, changed_copy(source, tmp_path, b"\n", b"  \n"), cleanups)
    manifest = folder / "corpus" / "manifest.json"
    bind_mount(nodes, "n2", manifest, changed_copy(manifest, tmp_path, b'"records": 600', b'"records": 601'), cleanups)
    tokenizer = folder / "corpus" / "tokenizer" / "tokenizer.json"
    bind_mount(nodes, "n2", tokenizer, changed_copy(tokenizer, tmp_path, b"\n", b" \n"), cleanups)
    shifted = tmp_path / "sitecustomize.py"
    shifted.write_text("import time\ntrue_time = time.time\ntime.time = lambda: true_time() - 100\n")
    bind_mount(nodes, "n2", folder / "site" / "sitecustomize.py", shifted, cleanups)
    mount_tmpfs(nodes, "n2", folder / "runs", "64k", cleanups)
    mount_tmpfs(nodes, "n2", Path("/dev/shm"), "8m", cleanups)
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 7200,) * 2)
    bind_mount(nodes, "n2", folder / "extensions", lock.parent.parent, cleanups)
    (folder / "prepared_env").write_text(
        f"DS_ACCELERATOR=cpu\nTORCH_EXTENSIONS_DIR={folder / 'extensions'}\n# threads\nGLOO_SOCKET_IFNAME=eth0\n"
    )
    cleanups.append((folder / "prepared_env").unlink)

    code, report = doctor()
    assert code == 1
    expect(report, "packages", "fail", "n2", rf"tqdm 1\.2\.3 instead of {tqdm.version}")
    expect(report, "code", "fail", "n2", "pretrain/objectives/base.py")
    expect(report, "data manifest", "fail", "n2", "SHA-256")
    expect(report, "tokenizer", "fail", "n2", "SHA-256")
    expect(report, "clock", "fail", "n2", r"(100|99)\.\d s behind")
    expect(report, "shared run folder", "fail", "n2", "not the folder")
    expect(report, "free space", "fail", "n2", "free in")
    expect(report, "shared memory", "warn", "n2", "8 MiB free")
    expect(report, "compiled ops", "warn", "n2", r"cpu_adam/lock is 1\d\d min old")
    expect(report, "environment", "fail", None, "threads")
    assert any(
        finding["check"] == "environment" and finding["level"] == "warn" and "OMP_NUM_THREADS=1" in finding["seen"]
        for finding in report["findings"]
    )
    assert not [finding for finding in report["findings"] if finding["nodes"] == ["n1"] and finding["level"] != "ok"]


@pytest.mark.slow
def test_faults_between_nodes_and_of_the_run_are_reported(doctor, nodes, config, cleanups):
    if shutil.which("iptables") is None:
        pytest.skip("blocking a port needs the Debian package iptables")
    folder = config.parent
    (folder / "three").write_text("n1 slots=1\nn2 slots=1\nn3 slots=1\n")
    nodes.run_on_node("n2", ["mount", "--bind", folder / "runs", folder / "runs"])
    cleanups.append(lambda: nodes.run_on_node("n2", ["umount", folder / "runs"]))
    nodes.run_on_node("n2", ["mount", "-o", "remount,bind,ro", folder / "runs"])
    (folder / "runs" / "run").mkdir(exist_ok=True)
    cleanups.append(try_lock(folder / "runs" / "run" / ".lock").close)
    drop_packets(nodes, "n1", "-p", "tcp", "--dport", "29500", cleanups=cleanups)
    drop_packets(nodes, "n2", "-p", "tcp", "--syn", "--source", "10.77.0.2", cleanups=cleanups)
    code, report = doctor(
        "--write-env",
        "model.shape.hidden_size=16384",
        "model.shape.intermediate_size=65536",
        "model.shape.num_hidden_layers=64",
        hostfile="three",
    )
    assert code == 1
    expect(report, "reached", "fail", "n3", "n3")
    expect(report, "run folder", "fail", "n2", "Read-only")
    assert [finding["nodes"] for finding in report["findings"] if "another run" in finding["seen"]] == [["n1", "n2"]]
    expect(report, "rendezvous", "fail", "n2", "29500: no answer")
    expect(report, "network", "fail", "n1", "cannot connect to n2")
    memory_failures = [
        finding
        for finding in report["findings"]
        if finding["check"] == "memory" and finding["level"] == "fail" and "a rank needs about" in finding["seen"]
    ]
    assert sorted(node for finding in memory_failures for node in finding["nodes"]) == list(NODES)
    expect(report, "all-reduce", "warn", None, "not tried")
    assert {(pair["from"], pair["to"]) for pair in report["measurements"]["pairs"] if "error" not in pair} == {
        ("n2", "n1")
    }


@pytest.mark.slow
def test_an_occupied_port_and_unreachable_nodes_are_reported(doctor, nodes, cleanups):
    server = nodes.start_on_node("n1", [sys.executable, "-m", "http.server", "29500"])
    cleanups.append(lambda: (server.kill(), server.wait()))
    nodes.disconnect("n2")
    cleanups.append(lambda: nodes.reconnect("n2"))
    code, report = doctor("--write-env")
    assert code == 1
    expect(report, "reached", "fail", "n2", "timed out|No route")  # messages of ssh, after ten seconds
    expect(report, "rendezvous", "fail", "n1", "port 29500 is taken")
    nodes.reconnect("n2")
    nodes.kill_node("n2")
    cleanups.append(lambda: nodes.start_node("n2"))
    code, report = doctor("--write-env", "--master_port", str(free_port()))
    assert code == 1
    expect(report, "reached", "fail", "n2", "refused")
    assert next(finding for finding in report["findings"] if finding["check"] == "all-reduce")["level"] == "ok"


def test_doctor_on_this_machine_alone_and_with_invalid_options(config, tmp_path):
    port = str(free_port())
    command = [sys.executable, DOCTOR, config, "--master_port", port]
    completed = run_command(
        command,
        check=False,
        TORCH_EXTENSIONS_DIR=str(tmp_path),
        PYTHONPATH=f"{ROOT}{os.pathsep}{config.parent / 'site'}",
    )
    assert completed.returncode == 0, completed.stdout
    assert re.search(r"^ok +all-reduce +2 ranks", completed.stdout, re.MULTILINE)
    assert re.search(r"^\d+ ok, 0 warn, 0 fail$", completed.stdout, re.MULTILINE)
    assert "neither --hostfile nor --num_gpus is given: assuming 2 ranks" in completed.stderr
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT}{os.pathsep}{config.parent / 'site'}"}
    completed = run_command([*command, "--num_gpus", "3"], check=False, **environment)
    assert completed.returncode == 0, completed.stdout
    assert re.search(r"^ok +all-reduce +3 ranks", completed.stdout, re.MULTILINE), completed.stdout
    assert "assuming" not in completed.stderr
    (tmp_path / "hosts").write_text("localhost slots=5\n")
    completed = run_command([*command, "--hostfile", tmp_path / "hosts"], check=False, **environment)
    assert completed.returncode == 1
    assert "must be a multiple of train.micro_batch_rows x ranks (2 x 5)" in completed.stdout
    for options, expected in ((["--num_gpus", "0"], "--num_gpus is 0"), (["--num_gpus", "two"], "invalid int value")):
        completed = run_command([*command, *options], check=False)
        assert completed.returncode == 2 and expected in completed.stderr
    completed = run_command([sys.executable, DOCTOR, config, "--hostfile", tmp_path / "nowhere"], check=False)
    assert completed.returncode == 2 and completed.stderr.startswith("error: cannot read the hostfile")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n1 slots=1\nn2 slots=two\n", "line 2: 'n2 slots=two'"),
        ("n1 slots=1\nn1 slots=1\n", "twice"),
        ("# none\n", "names no host"),
        ("\ufeffn1 slots=1\n", "line 1: the file starts with a byte order mark, which DeepSpeed reads as"),
    ],
)
def test_an_invalid_hostfile_is_reported_with_its_line(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=message):
        read_hostfile(str(tmp_path / "hosts"))


def test_nodes_and_slots_are_read_from_hostfiles_and_slurm(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("# nodes\nn1 slots=8\n\n  n2   slots=4\n")
    assert read_hostfile(str(tmp_path / "hosts")) == [Host("n1", 8), Host("n2", 4)]
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert slurm_hosts() == []


def test_rounds_have_each_pair_once_and_each_node_at_most_once_per_round():
    for count in range(1, 8):
        nodes = [f"n{number}" for number in range(count)]
        rounds = network.rounds(nodes)
        pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
        assert len(set(pairs)) == len(pairs) == count * (count - 1) // 2
        assert all(len({node for pair in pairs for node in pair}) == 2 * len(pairs) for pairs in rounds)


def test_forwarded_prefixes_equal_the_ones_in_deepspeed():
    spec = importlib.util.find_spec("deepspeed")
    runner = (Path(spec.origin).parent / "launcher" / "runner.py").read_text()
    assert set(re.findall(r"'(\w+)'", re.search(r"EXPORT_ENVS = \[(.*)\]", runner)[1])) == set(
        environment.FORWARDED_PREFIXES
    )


def test_lines_that_deepspeed_cannot_read_are_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    (tmp_path / ".deepspeed_env").write_text('A=1\n\n# B=2\nexport C=3\nD="4"\nnonsense\n')
    (path,) = environment.env_files()
    assert [fault.split(" ")[1].rstrip(":") for fault in environment.invalid_lines(path)] == ["2", "3", "4", "5", "6"]
    (tmp_path / ".deepspeed_env").write_text("A=1\nOMP_NUM_THREADS=7\n")
    environment.write_env_file(
        {"OMP_NUM_THREADS": "1", "HF_TOKEN": "secret", "HF_HOME": "/data", "PS1": "$", "NCCL_DEBUG": 'a"b'}
    )
    assert (tmp_path / ".deepspeed_env").read_text() == "A=1\nOMP_NUM_THREADS=1\nHF_HOME=/data\n"


def levels(findings: list[Finding]) -> list[tuple[str, tuple[str, ...]]]:
    assert all(finding.remedy for finding in findings if finding.level != "ok")
    return [(finding.level, finding.nodes) for finding in findings]


def gpu_facts(count: int = 2, used: int = 0, driver: str = "570.1", torch_cuda: str | None = "12.8") -> dict:
    return {
        "accelerator": "cuda",
        "torch_cuda": torch_cuda,
        "gpus": [{"name": "GPU", "memory": 80 * GIB, "used": used, "driver": driver}] * count,
    }


@pytest.mark.parametrize(
    ("visible", "selected"),
    [
        (None, ["A", "B", "C"]),
        ("2,0", ["C", "A"]),
        ("1", ["B"]),
        ("", []),
        ("-1", []),
        ("1,-1,0", ["B"]),
        ("0,7,1", ["A"]),
        ("GPU-b1", ["B"]),
        ("GPU-", []),
    ],
)
def test_the_gpus_of_a_node_are_the_ones_that_cuda_shows(tmp_path, monkeypatch, visible, selected):
    rows = "".join(f"{name}, 81559, 4, 570.1, GPU-{name.lower()}1f\\n" for name in "ABC")
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\nprintf '{rows}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = facts.devices()
    assert [gpu["name"] for gpu in found["gpus"]] == selected
    assert found["accelerator"] == os.environ.get("DS_ACCELERATOR", "cuda" if selected else "cpu")


def test_problems_of_gpu_nodes_are_reported():
    slots = {"n1": 2, "n2": 2}
    check = checks_devices.check_devices
    assert levels(check({"n1": gpu_facts(), "n2": gpu_facts()}, slots)) == [("ok", ())]
    assert levels(check({"n1": gpu_facts(), "n2": gpu_facts(count=1)}, slots)) == [("fail", ("n2",))]
    assert levels(check({"n1": gpu_facts(), "n2": gpu_facts(used=20 * GIB)}, slots)) == [("warn", ("n2",))]
    assert levels(check({"n1": gpu_facts(), "n2": gpu_facts(driver="560.1")}, slots)) == [("fail", ("n2",))]
    assert levels(check({"n1": gpu_facts(), "n2": gpu_facts()}, slots, chosen="cpu")) == [("fail", ("n1", "n2"))]
    assert levels(check({"n1": gpu_facts(), "n2": {"accelerator": "cpu", "gpus": []}}, slots)) == [("fail", ("n2",))]
    assert levels(check({"n1": gpu_facts(torch_cuda="13.0")}, {"n1": 2})) == [("fail", ("n1",))], (
        "CUDA 13 needs a newer driver"
    )
    assert levels(check({"n1": gpu_facts(torch_cuda="13.0", driver="580.65")}, {"n1": 2})) == [("ok", ())]
    assert levels(check({"n1": gpu_facts(torch_cuda=None)}, {"n1": 2})) == [("fail", ("n1",))], (
        "torch was built without CUDA"
    )
    shm = {"n1": {"shm_free": 8 * GIB}, "n2": {"shm_free": 60 * 2**20}}
    assert levels(checks_devices.check_shared_memory(shm, slots, cuda=True)) == [("fail", ("n2",))]
    lock = {
        "locks": [{"path": "x/lock", "age": 3600}],
        "compiling": False,
        "compiler": "c++",
        "c_compiler": "gcc",
        "python_header": True,
        "ops": [],
    }
    assert levels(checks_nodes.check_extensions({"n1": lock}, cuda=True, compiles=False)) == [("fail", ("n1",))]
    assert levels(
        checks_nodes.check_extensions({"n1": lock | {"locks": [], "compiler": None}}, cuda=True, compiles=True)
    ) == [("fail", ("n1",))]
    for missing in ({"c_compiler": None}, {"python_header": False}):
        found = checks_nodes.check_extensions({"n1": lock | {"locks": []} | missing}, cuda=True, compiles=False)
        assert levels(found) == [("fail", ("n1",))], "FlexAttention is compiled on CUDA even with train.compile=false"
        assert levels(
            checks_nodes.check_extensions({"n1": lock | {"locks": []} | missing}, cuda=False, compiles=False)
        ) == [("ok", ())]


@pytest.mark.parametrize(("gib", "level"), [(60, "ok"), (75, "warn"), (90, "fail")])
def test_estimated_memory_of_a_rank_is_compared_with_its_gpu(gib, level):
    estimate = ResourceEstimate(10**9, {"cuda": gib * GIB, "cpu": 0}, False, 0, "bf16", 0, 4)
    found = checks_nodes.check_memory({"n1": {"available": 0}}, {"n1": gpu_facts()}, {"n1": 2}, estimate)
    assert [finding.level for finding in found] == [level]


def test_a_node_that_differs_from_the_lock_file_is_named():
    facts = {"n1": {"installed": {"tqdm": "1"}}, "n2": {"installed": {"tqdm": "2+cpu"}}}
    common = {"locked": {"tqdm": "2"}, "required": ["tqdm", "torch"]}
    found = checks_nodes.check_packages({node: fact | common for node, fact in facts.items()})
    assert levels(found) == [("fail", ("n1",)), ("fail", ("n1",)), ("fail", ("n2",))]
    assert "tqdm 1 instead of 2+cpu" in found[0].seen and "torch" in found[1].seen
    assert levels(
        checks_nodes.check_packages({"n1": {"installed": {"tqdm": "3"}, "locked": {"tqdm": "2"}, "required": []}})
    ) == [("warn", ())]


def test_a_locked_or_full_run_folder_is_reported():
    estimate = ResourceEstimate(10, {}, False, 0, "fp32", checkpoint=GIB, checkpoints=4)
    fact = {"folder": "runs", "free": 100 * GIB, "locked": False}
    assert levels(checks_run.check_run_folder({"n1": fact}, estimate, 0)) == [("ok", ()), ("ok", ())]
    assert levels(checks_run.check_run_folder({"n1": fact | {"locked": True}}, estimate, 0)) == [
        ("fail", ("n1",)),
        ("ok", ()),
    ]
    assert [
        levels(checks_run.check_run_folder({"n1": fact | {"free": gib * GIB}}, estimate, existing))[1][0]
        for gib, existing in ((1, 0), (3, 0), (3, 1))
    ] == ["fail", "warn", "ok"]


def test_a_slow_pair_and_a_host_name_with_a_loopback_address_are_reported():
    pair = {"latency_seconds": 1e-4, "bytes_per_second": 1e9}
    pairs = [{"from": one, "to": other} | pair for one in "abc" for other in "abc" if one != other]
    assert levels(checks_run.check_node_pairs(pairs)) == [("ok", ())]
    pairs[3] |= {"bytes_per_second": 1e8}
    found = checks_run.check_node_pairs(pairs)
    assert levels(found) == [("warn", ())] and f"{pairs[3]['from']} -> {pairs[3]['to']}" in found[0].seen
    facts = {"n1": {"first": "10.0.0.1", "own": "127.0.1.1"}, "n2": {"first": "10.0.0.2", "own": "10.0.0.2"}}
    assert levels(checks_run.check_hostnames(facts, cuda=False, chosen=False)) == [("fail", ("n1",))]
    assert levels(checks_run.check_hostnames(facts, cuda=False, chosen=True)) == [("ok", ())]
