"""The image, its two nodes and its health check.

The tests that build and run the image need a Docker engine and JEPA_TEST_BASE:

    JEPA_TEST_BASE=debian:bookworm-slim JEPA_TEST_BUILD="--network host" \\
        python -m pytest -m slow tests/cluster/test_container.py
"""

import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from deepspeed.launcher.multinode_runner import PDSHRunner

from tests.commands import ROOT, run_command, tiny_config, write_config

DOCKER = ROOT / "docker"
SHORT_RUN = (
    "train.epochs=null train.steps=4 checkpoint.every=2 evaluation.every=0 "
    "'evaluation.tasks=[{name: nl_rx, rows: 20}]' monitor.log_every=1 monitor.validate_every=4"
)


@pytest.mark.parametrize(
    ("linter", "files"), [("hadolint", [ROOT / "Dockerfile"]), ("shellcheck", sorted(DOCKER.glob("*.sh")))]
)
def test_linters_report_nothing(linter, files):
    if shutil.which(linter) is None:
        pytest.skip(f"{linter} is not installed")
    completed = subprocess.run([linter, *files], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout


def test_the_hostfile_names_the_nodes_of_the_compose_file_and_no_port_is_open_to_the_network():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    nodes = {name: service for name, service in services.items() if "hostname" in service}
    assert [line.split()[0] for line in (DOCKER / "hostfile").read_text().splitlines()] == list(nodes)
    assert all(name == service["hostname"] for name, service in nodes.items())
    assert [name for name, service in nodes.items() if service["command"][0] == "launcher"] == ["node1"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:6006:6006"]


def compose() -> list[str]:
    """Return the command of Docker Compose, as a plugin or separate program. Skips the test if neither is installed."""
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose", "-f", str(DOCKER / "compose.yaml")]
    if shutil.which("docker-compose"):
        return ["docker-compose", "-f", str(DOCKER / "compose.yaml")]
    pytest.skip("neither `docker compose` nor docker-compose is installed")


def test_the_compose_file_is_valid():
    variables = {"ARGS": "train.steps=7", "JEPA_IMAGE": "sha256:1"}
    completed = subprocess.run([*compose(), "config"], env=os.environ | variables, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    node1 = yaml.safe_load(completed.stdout)["services"]["node1"]
    assert node1["command"][-1] == "ARGS=--hostfile docker/hostfile train.steps=7"
    assert node1["environment"]["JEPA_IMAGE"] == "sha256:1"


def write_deepspeed_env(home: Path, **variables: str) -> str:
    """Write .deepspeed_env with the function of entrypoint.sh, and return its standard error."""
    function = re.search(
        r"^write_deepspeed_env\(\) \{.*?^\}$", (DOCKER / "entrypoint.sh").read_text(), re.DOTALL | re.MULTILINE
    )[0]
    completed = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{function}\nwrite_deepspeed_env"],
        capture_output=True,
        text=True,
        check=True,
        env=variables | {"PATH": os.environ["PATH"], "HOME": str(home)},
    )
    return completed.stderr


VARIABLES = {
    "GLOO_SOCKET_IFNAME": "^lo,docker0",
    "NCCL_SOCKET_IFNAME": "=eth0",
    "JEPA_NOTE": "two words; 'quoted' & <more> #1",
    "HF_HOME": "/data",
    "OMP_EMPTY": "",
}


def test_deepspeed_forwards_the_variables_of_the_container_unchanged(tmp_path):
    warnings = write_deepspeed_env(tmp_path, **VARIABLES, HF_TOKEN="a$b", JEPA_LINES="a\nb", UNRELATED="c")
    assert [line.split()[1] for line in warnings.splitlines()] == ["HF_TOKEN", "JEPA_LINES"]
    arguments = defaultdict(str, user_args=[], user_script="true", ssh_port=None, venv_script=None)
    runner = PDSHRunner(
        SimpleNamespace(
            **{
                name: arguments[name]
                for name in (
                    "user_args",
                    "user_script",
                    "ssh_port",
                    "venv_script",
                    "launcher_args",
                    "master_addr",
                    "master_port",
                    "no_python",
                    "module",
                    "no_local_rank",
                    "save_pid",
                    "enable_each_rank_log",
                )
            }
        ),
        "",
    )
    for line in (tmp_path / ".deepspeed_env").read_text().splitlines():
        runner.add_export(*line.split("=", maxsplit=1))  # as deepspeed/launcher/runner.py does
    command, _, _ = runner.get_cmd({}, {"n1": 1})
    exports = next(word for word in command if word.startswith("export "))
    arrived = subprocess.run(
        ["env", "-i", "sh", "-c", f"{exports} env -0"], capture_output=True, text=True, check=True
    ).stdout.split("\0")
    forwarded = dict(pair.split("=", maxsplit=1) for pair in arrived if pair)
    assert {name: value for name, value in forwarded.items() if name not in ("PWD", "SHLVL", "_")} == VARIABLES | {
        "PATH": os.environ["PATH"]
    }


@pytest.mark.slow
def test_pdsh_forwards_the_variables_of_the_container_to_the_nodes(nodes, tmp_path):
    variables = VARIABLES | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    write_deepspeed_env(tmp_path, **variables)
    (tmp_path / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    script = tmp_path / "show.py"
    script.write_text(
        "import json, os, sys\n"
        f"values = {{n: os.environ.get(n) for n in {list(variables)}}}\n"
        "open(sys.argv[0] + os.environ['RANK'], 'w').write(json.dumps(values))\n"
    )
    nodes.run_on_control([Path(sys.executable).parent / "deepspeed", "--hostfile", "hostfile", script], cwd=tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"show.py{rank}").read_text()) == variables


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


@pytest.mark.parametrize(
    ("status", "hours", "healthy"), [("running", 0.1, True), ("running", 2, False), ("finished", 2, True)]
)
def test_a_silent_run_is_unhealthy_while_it_is_the_newest_run(health, tmp_path, status, hours, healthy):
    assert health.problem(tmp_path, tmp_path / "no.pid") is None
    write_run(tmp_path / "group" / "run", status, hours * 3600)
    problem = health.problem(tmp_path, tmp_path / "no.pid")
    assert problem is None if healthy else "has written nothing for 120 minutes" in problem
    write_run(tmp_path / "newer", "finished", 60)
    assert health.problem(tmp_path, tmp_path / "no.pid") is None


def test_a_new_checkpoint_counts_as_a_heartbeat(health, tmp_path):
    write_run(tmp_path / "run", "running", 7200)
    (tmp_path / "run" / "checkpoints").mkdir()
    assert health.problem(tmp_path, tmp_path / "no.pid") is None


def test_a_read_only_folder_or_an_unresponsive_sshd_is_unhealthy(health, tmp_path, monkeypatch):
    assert "cannot write to" in health.problem(tmp_path / "nowhere", tmp_path / "no.pid")
    (tmp_path / "sshd.pid").write_text("1")
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        monkeypatch.setattr(health, "SSHD_PORT", server.getsockname()[1])

        def greet(words: bytes):
            connection, _ = server.accept()
            connection.sendall(words)
            connection.close()

        for words, expected in (
            (b"SSH-2.0-OpenSSH\r\n", None),
            (b"HTTP", "a program other than sshd answers on the port of sshd: stop it"),
        ):
            greeter = threading.Thread(target=greet, args=(words,))
            greeter.start()
            assert health.problem(tmp_path, tmp_path / "sshd.pid") == expected
            greeter.join()
    assert "sshd does not answer" in health.problem(tmp_path, tmp_path / "sshd.pid")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [{}, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}])
def test_a_run_on_cpu_compiles_no_op_of_deepspeed(tmp_path, zero):
    path = write_config(tmp_path, tiny_config(tmp_path, train__steps=2, deepspeed={"zero_optimization": zero}))
    run_command(["python", "-m", "data_prep", str(path)])
    run_command(["python", "launcher/run.py", str(path)], TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert not (tmp_path / "extensions").exists()


def docker(*arguments: str, check: bool = True, **more: str) -> subprocess.CompletedProcess:
    completed = subprocess.run(["docker", *arguments], env=os.environ | more, capture_output=True, text=True)
    assert not check or completed.returncode == 0, (
        f"docker {arguments} ended with {completed.returncode}:\n{completed.stdout[-4000:]}\n{completed.stderr[-4000:]}"
    )
    return completed


@pytest.fixture(scope="module")
def image() -> str:
    """Build an image from the working tree and return its id."""
    if "JEPA_TEST_BASE" not in os.environ:
        pytest.skip(
            "JEPA_TEST_BASE is not set: set it to the base image, and JEPA_TEST_BUILD to further docker build options"
        )
    if not shutil.which("docker") or docker("info", check=False).returncode:
        pytest.skip("no Docker engine")
    built = subprocess.run(
        [DOCKER / "build.sh", *shlex.split(os.environ.get("JEPA_TEST_BUILD", ""))],
        env=os.environ | {"BASE": os.environ["JEPA_TEST_BASE"]},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    return built.stdout.splitlines()[-1]


@pytest.fixture
def volume() -> str:
    name = f"jepatest-{os.getpid()}"
    yield name
    docker("volume", "rm", "--force", name)


@pytest.mark.slow
def test_the_image_runs_the_demo_and_the_tests_as_an_unprivileged_user(image, volume):
    labels = json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", image).stdout)
    assert labels["org.opencontainers.image.base.name"] == os.environ["JEPA_TEST_BASE"]
    docker(
        "run",
        "--rm",
        "--init",
        "--env",
        f"JEPA_IMAGE={image}",
        "--volume",
        f"{volume}:/app/runs",
        image,
        "sh",
        "-c",
        f'make demo ARGS="{SHORT_RUN}" && ! ls ~/.cache/torch_extensions',
    )
    read = docker(
        "run",
        "--rm",
        "--volume",
        f"{volume}:/app/runs",
        image,
        "sh",
        "-c",
        "id -u; cat runs/demo-llm_jepa/environment.json",
    )
    user, recorded = read.stdout.split("\n", 1)
    environment = json.loads(recorded)
    assert user == "10001" and environment["image"] == image
    assert environment["revision"] == labels["org.opencontainers.image.revision"]
    docker(
        "run",
        "--rm",
        "--init",
        image,
        "make",
        "test",
        "ARGS=tests/data_prep/test_shards.py tests/data_prep/utils/test_ragged.py",
    )


def key_files(compose: list[str], service: str) -> set[str]:
    """Return the names of the files in the ssh folder of a container that has exited."""
    container = subprocess.run(
        [*compose, "ps", "--all", "--quiet", service], capture_output=True, text=True, check=True
    ).stdout.strip()
    archive = subprocess.run(
        ["docker", "cp", f"{container}:/home/jepa/.ssh", "-"], capture_output=True, check=True
    ).stdout
    return set(tarfile.open(fileobj=io.BytesIO(archive)).getnames())


@pytest.mark.slow
def test_two_nodes_train_and_only_the_launcher_has_a_key(image):
    command = [*compose(), "--project-name", "jepatest"]
    try:
        completed = subprocess.run(
            [*command, "up", "--exit-code-from", "node1"],
            env=os.environ | {"ARGS": SHORT_RUN, "JEPA_IMAGE": image},
            capture_output=True,
            text=True,
        )
        assert completed.returncode == 0, completed.stdout[-6000:]
        assert ".ssh/launcher" in key_files(command, "node1")
        assert key_files(command, "node2") == {".ssh", ".ssh/host", ".ssh/host.pub"}
        volumes = ["--volume", "jepatest_runs:/app/runs", "--volume", "jepatest_cluster:/cluster"]
        shared = docker(
            "run",
            "--rm",
            *volumes,
            image,
            "sh",
            "-c",
            "cat runs/demo-llm_jepa/environment.json; ! grep -rl PRIVATE /cluster",
        )
        assert json.loads(shared.stdout)["ranks"] == 2 and json.loads(shared.stdout)["image"] == image
    finally:
        subprocess.run([*command, "down", "--volumes"], capture_output=True)
