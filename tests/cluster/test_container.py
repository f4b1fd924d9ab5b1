"""The image, its two nodes and its health check: what can be checked without an engine, and, with one, an image that is built and run.

    JEPA_TEST_BASE=debian:bookworm-slim JEPA_TEST_BUILD="--network host" python -m pytest -m slow tests/cluster/test_container.py
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from contextlib import closing

import pytest
import yaml

from tests.launching import ROOT

DOCKER = ROOT / "docker"
SHORT = "train.epochs=null train.steps=20 train.warmup_fraction=0 checkpoint.every=10 evaluation={every: 0, tasks: []} monitor.validate_every=10"


@pytest.mark.parametrize(("linter", "files"), [("hadolint", [ROOT / "Dockerfile"]), ("shellcheck", sorted(DOCKER.glob("*.sh")))])
def test_linters_have_nothing_to_say(linter, files):
    if shutil.which(linter) is None:
        pytest.skip(f"{linter} is not installed")
    done = subprocess.run([linter, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_hostfile_names_the_nodes_of_the_compose_file_and_nothing_is_open_to_the_network():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    nodes = {name: service for name, service in services.items() if "hostname" in service}
    assert [line.split()[0] for line in (DOCKER / "hostfile").read_text().splitlines()] == list(nodes)
    assert all(name == service["hostname"] for name, service in nodes.items())
    assert [name for name, service in nodes.items() if service["command"][0] == "launcher"] == ["node1"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:6006:6006"]


def compose() -> list[str]:
    """The command of Compose, the plugin or the program of its own; skips the test where there is none."""
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose", "-f", str(DOCKER / "compose.yaml")]
    if shutil.which("docker-compose"):
        return ["docker-compose", "-f", str(DOCKER / "compose.yaml")]
    pytest.skip("neither `docker compose` nor docker-compose is installed")


def test_compose_reads_its_file():
    variables = {"ARGS": "train.steps=7", "JEPA_IMAGE": "sha256:1"}
    done = subprocess.run([*compose(), "config"], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    node1 = yaml.safe_load(done.stdout)["services"]["node1"]
    assert node1["command"][-1] == "ARGS=--hostfile docker/hostfile train.steps=7" and node1["environment"]["JEPA_IMAGE"] == "sha256:1"


@pytest.fixture
def health():
    spec = importlib.util.spec_from_file_location("healthcheck", DOCKER / "healthcheck.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(folder, status: str, age: float) -> None:
    folder.mkdir(parents=True)
    for file, text in (("status.json", json.dumps({"status": status, "step": 3})), ("metrics.jsonl", "{}\n")):
        (folder / file).write_text(text)
        os.utime(folder / file, (time.time() - age,) * 2)


@pytest.mark.parametrize(("status", "hours", "healthy"), [("running", 0.1, True), ("running", 2, False), ("finished", 2, True)])
def test_a_run_that_is_silent_is_unhealthy_as_long_as_it_is_the_newest(health, tmp_path, status, hours, healthy):
    assert health.problem(tmp_path, tmp_path / "no.pid") is None
    write_run(tmp_path / "group" / "run", status, hours * 3600)
    found = health.problem(tmp_path, tmp_path / "no.pid")
    assert found is None if healthy else "has written nothing for 120 minutes" in found
    write_run(tmp_path / "newer", "finished", 60)
    assert health.problem(tmp_path, tmp_path / "no.pid") is None


def test_metrics_or_a_checkpoint_are_signs_of_life(health, tmp_path):
    write_run(tmp_path / "run", "running", 7200)
    (tmp_path / "run" / "checkpoints").mkdir()
    assert health.problem(tmp_path, tmp_path / "no.pid") is None


def test_a_folder_that_cannot_be_written_and_an_sshd_that_does_not_answer_are_unhealthy(health, tmp_path, monkeypatch):
    assert "cannot write to" in health.problem(tmp_path / "nowhere", tmp_path / "no.pid")
    (tmp_path / "sshd.pid").write_text("1")
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        monkeypatch.setattr(health, "SSHD_PORT", server.getsockname()[1])

        def greet(words: bytes):
            connection, _ = server.accept()
            connection.sendall(words)
            connection.close()

        for words, expected in ((b"SSH-2.0-OpenSSH\r\n", None), (b"HTTP", "what answers on the port of sshd is something else")):
            greeter = threading.Thread(target=greet, args=(words,))
            greeter.start()
            assert health.problem(tmp_path, tmp_path / "sshd.pid") == expected
            greeter.join()
    assert "sshd does not answer" in health.problem(tmp_path, tmp_path / "sshd.pid")
