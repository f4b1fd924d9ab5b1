"""Two nodes and a control host on one machine, each with a network, an sshd, and host name, processes and mounts of its own.

Network namespaces on a bridge of their own; nothing of the machine's network changes, and the hosts reach each other alone. Takes root.
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
"""And the Debian packages that they come with."""
PREFIX = "jepatest"
"""Namespaces are PREFIX-PID-HOST, with the id of the process that made them."""
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
    """The hosts while they run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ssh_config = folder / "ssh_config"
        self._sshd: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Make the network and start the nodes."""
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
            hosts = Path("/etc/netns") / namespace / "hosts"  # `ip netns exec` puts it in the place of /etc/hosts
            hosts.parent.mkdir(parents=True)
            hosts.write_text(
                "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in HOSTS.items())
            )
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start a node, or start it again after `kill_node`."""
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
        """Run a command to its end on the control host; with `check`, fail showing what it printed. `more` are environment variables."""
        env = environment(**more)
        env["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{env['PATH']}"
        done = subprocess.run(
            self._as_host("ctl", command), cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, (
            f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
        return done

    def start_on_control(self, command: list[str | Path], log: Path, cwd: Path = ROOT, **more: str) -> subprocess.Popen:
        """Start a command on the control host; SIGKILL to it ends all that it started there."""
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
        """Run a command on a node, past ssh: it sees what the node sees, so that `mount` changes the files of this node alone."""
        done = subprocess.run(
            ["nsenter", "--target", str(self.pid(node)), "--mount", "--uts", "--net", "--pid", *map(str, command)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert not check or done.returncode == 0, (
            f"{command} on {node} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
        return done

    def start_on_node(self, node: str, command: list[str | Path]) -> subprocess.Popen:
        """Start a command on a node; it ends with the node."""
        return subprocess.Popen(
            ["nsenter", "--target", str(self.pid(node)), "--mount", "--uts", "--net", "--pid", *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def pid(self, node: str) -> int:
        """The first process of a node, its sshd, counted from outside."""
        return psutil.Process(self._sshd[node].pid).children()[0].pid

    def kill_node(self, node: str) -> None:
        """A node that dies at once, with all that runs there; its address stays, and refuses connections."""
        self._sshd[node].kill()
        self._sshd[node].wait()

    def disconnect(self, node: str) -> None:
        """Pull the plug of a node's network: what is sent to it is lost without a word."""
        _ip("-n", self._namespace(SWITCH), "link", "set", f"to-{node}", "down")

    def reconnect(self, node: str) -> None:
        """Put it in again."""
        _ip("-n", self._namespace(SWITCH), "link", "set", f"to-{node}", "up")

    def close(self) -> None:
        """End all that runs on the hosts, and remove them."""
        _remove(str(os.getpid()))
        for process in self._sshd.values():
            process.wait()

    def _namespace(self, host: str) -> str:
        return f"{PREFIX}-{os.getpid()}-{host}"

    def _as_host(self, host: str, command: list[str | Path]) -> list[str]:
        """The command with network, name, processes and mounts of a host; it ends with this process."""
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
    """Two nodes, n1 and n2, that start from nothing; skips the test, saying why, where they cannot run."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("two nodes on one machine take network namespaces, which only root on Linux can make")
    if missing := sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None}):
        pytest.skip(f"two nodes on one machine take the Debian packages {', '.join(missing)}")
    if subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True
    ).returncode:
        pytest.skip("two nodes on one machine take network namespaces, which this machine does not allow")
    hosts = Cluster(folder)
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.close()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


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
    """What a test process left that was killed."""
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
