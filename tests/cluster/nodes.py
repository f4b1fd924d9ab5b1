"""Two nodes and a control host on one machine.

Each of the three hosts has its own network, host name, processes and mounts. Each node runs an sshd. The hosts are
network namespaces with a separate bridge: the network of the machine does not change, and the hosts can reach only each
other. This needs root.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.commands import ROOT, TIMEOUT, environment

HOSTS = {"ctl": "10.77.0.1", "n1": "10.77.0.2", "n2": "10.77.0.3"}
NODES = ("n1", "n2")
SWITCH = "switch"
PROGRAMS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
"""Required programs and their Debian packages."""
PREFIX = "jepatest"
"""Prefix of the namespaces, which are named PREFIX-PID-HOST after the process that created them."""
SSHD_OPTIONS = {
    "Port": "2222",
    "PidFile": "none",
    "StrictModes": "no",
    "PermitRootLogin": "prohibit-password",
    "PasswordAuthentication": "no",
    "UsePAM": "no",
    "MaxStartups": "50",
    "AllowUsers": "root",
}


class Cluster:
    """The running hosts."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ssh_config = folder / "ssh_config"
        self._sshd: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Create the network and start the nodes."""
        _remove_abandoned()
        _write_keys(self.folder, self.ssh_config)
        switch = self._namespace(SWITCH)
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for host, address in HOSTS.items():
            namespace = self._namespace(host)
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", switch, "link", "add", f"to-{host}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("-n", switch, "link", "set", f"to-{host}", "master", "br0", "up")
            _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            hosts = Path("/etc/netns") / namespace / "hosts"  # `ip netns exec` mounts it over /etc/hosts
            hosts.parent.mkdir(parents=True)
            hosts.write_text(
                "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in HOSTS.items())
            )
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start a node, or restart it after `kill_node`."""
        options = SSHD_OPTIONS | {"AuthorizedKeysFile": str(self.folder / "id.pub")}
        sshd = [
            shutil.which("sshd"),
            "-D",
            "-e",
            "-f",
            "/dev/null",
            "-h",
            str(self.folder / "hostkey"),
            *(word for name, value in options.items() for word in ("-o", f"{name}={value}")),
        ]
        with open(self.folder / f"{node}.log", "a") as log:
            self._sshd[node] = subprocess.Popen(
                self._as_host(node, sshd), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + TIMEOUT
        while self.run_on_control(["ssh", node, "true"], check=False).returncode:
            assert time.monotonic() < deadline, (self.folder / f"{node}.log").read_text()
            time.sleep(0.1)

    def run_on_control(
        self,
        command: list[str | Path],
        check: bool = True,
        timeout: float = TIMEOUT,
        cwd: Path = ROOT,
        **more: str,
    ) -> subprocess.CompletedProcess:
        """Run a command on the control host. With `check`, fail and show its output if the exit code is not 0.

        `more` are additional environment variables.
        """
        env = environment(**more)
        env["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{env['PATH']}"
        completed = subprocess.run(
            self._as_host("ctl", command), cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
        )
        assert not check or completed.returncode == 0, (
            f"{command} ended with {completed.returncode}:\n{completed.stdout[-4000:]}\n{completed.stderr[-4000:]}"
        )
        return completed

    def start_on_control(self, command: list[str | Path], log: Path, cwd: Path = ROOT, **more: str) -> subprocess.Popen:
        """Start a command on the control host. If it is killed, all its child processes on that host are killed too."""
        env = environment(**more)
        env["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{env['PATH']}"
        with open(log, "a") as output:
            return subprocess.Popen(
                self._as_host("ctl", command),
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def run_on_node(self, node: str, command: list[str | Path], check: bool = True) -> subprocess.CompletedProcess:
        """Run a command on a node without ssh.

        The command runs in the namespaces of the node, so `mount` changes the files of this node only.
        """
        completed = subprocess.run(
            ["nsenter", "--target", str(self.pid(node)), "--mount", "--uts", "--net", "--pid", *map(str, command)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert not check or completed.returncode == 0, (
            f"{command} on {node} ended with {completed.returncode}:\n{completed.stdout}\n{completed.stderr}"
        )
        return completed

    def start_on_node(self, node: str, command: list[str | Path]) -> subprocess.Popen:
        """Start a command on a node. It is killed together with the node."""
        return subprocess.Popen(
            ["nsenter", "--target", str(self.pid(node)), "--mount", "--uts", "--net", "--pid", *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def pid(self, node: str) -> int:
        """Return the process id of a node's first process, its sshd, in the namespace of the machine."""
        return psutil.Process(self._sshd[node].pid).children()[0].pid

    def kill_node(self, node: str) -> None:
        """Kill a node with all its processes. Its address remains and refuses connections."""
        self._sshd[node].kill()
        self._sshd[node].wait()

    def disconnect(self, node: str) -> None:
        """Disconnect a node's network. Packets to the node are silently lost."""
        _ip("-n", self._namespace(SWITCH), "link", "set", f"to-{node}", "down")

    def reconnect(self, node: str) -> None:
        """Reconnect a node's network."""
        _ip("-n", self._namespace(SWITCH), "link", "set", f"to-{node}", "up")

    def close(self) -> None:
        """Kill all processes of the hosts, and remove the hosts."""
        _remove(str(os.getpid()))
        for process in self._sshd.values():
            process.wait()

    def _namespace(self, host: str) -> str:
        return f"{PREFIX}-{os.getpid()}-{host}"

    def _as_host(self, host: str, command: list[str | Path]) -> list[str]:
        """Return the command that runs `command` with the network, name, processes and mounts of a host.

        The returned command is killed when this process exits.
        """
        return [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "ip",
            "netns",
            "exec",
            self._namespace(host),
            "unshare",
            "--uts",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child=KILL",
            "--mount-proc",
            "sh",
            "-c",
            f'hostname {host}; exec "$@"',
            "sh",
            *map(str, command),
        ]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Yield a new cluster with two nodes, n1 and n2. Skips the test if they cannot run on this machine."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("two nodes on one machine need network namespaces, which only root on Linux can create")
    if missing := sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None}):
        pytest.skip(f"two nodes on one machine need the Debian packages {', '.join(missing)}")
    if subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True
    ).returncode:
        pytest.skip("two nodes on one machine need network namespaces, which this machine does not allow")
    hosts = Cluster(folder)
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.close()


def _ip(*arguments: str) -> None:
    completed = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert completed.returncode == 0, f"ip {' '.join(arguments)}: {completed.stderr}"


def _write_keys(folder: Path, ssh_config: Path) -> None:
    (folder / "bin").mkdir(parents=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("id", "hostkey"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    key = (folder / "hostkey.pub").read_text().strip()
    (folder / "known_hosts").write_text(
        "".join(f"[{name}]:2222 {key}\n" for node in NODES for name in (node, HOSTS[node]))
    )
    ssh_config.write_text(f"""Host {" ".join(NODES)} {" ".join(HOSTS.values())}
  Port 2222
  User root
  IdentityFile {folder / "id"}
  IdentitiesOnly yes
  UserKnownHostsFile {folder / "known_hosts"}
  StrictHostKeyChecking yes
  LogLevel ERROR
  ConnectTimeout 10
  ServerAliveInterval 5
  ServerAliveCountMax 3
""")
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {ssh_config} "$@"\n')
    wrapper.chmod(0o755)


def _remove_abandoned() -> None:
    """Remove the hosts of test processes that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for owner in set(re.findall(rf"^{PREFIX}-(\d+)-", listed, re.MULTILINE)):
        if not psutil.pid_exists(int(owner)):
            _remove(owner)


def _remove(owner: str) -> None:
    for host in (*HOSTS, SWITCH):
        namespace = f"{PREFIX}-{owner}-{host}"
        for pid in subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
        shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)
