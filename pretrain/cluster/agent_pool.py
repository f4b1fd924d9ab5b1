"""Starting an agent on every node, and asking all of them at once.

Agents are asked in JSON lines over their standard input and output, so nothing has to be opened on a node. An agent ends when its input closes:
none is left behind when this process ends, however it does.
"""

import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pretrain.cluster.hosts import Host

MODULE = "pretrain.cluster.agent"
START_TIMEOUT_SECONDS = 60.0
"""That a node has to start Python and answer in, from a file system that may be slow."""
CONNECT_TIMEOUT_SECONDS = 10
"""That ssh has to connect in."""
CONNECTION_LOST = "the connection was lost"
"""How the reason of a node begins that answered first."""


class AgentError(Exception):
    """A node that cannot be reached, does not answer in time or has gone; the text says which."""


class Agent:
    """The process that answers for a node."""

    def __init__(self, command: list[str]):
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._said: deque[str] = deque(maxlen=20)
        self._number = 0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        requests, output, errors = self._process.stdin, self._process.stdout, self._process.stderr
        assert requests is not None and output is not None and errors is not None
        self._requests, self._output = requests, output
        threading.Thread(target=self._read, daemon=True).start()
        self._errors = threading.Thread(
            target=lambda: self._said.extend(filter(None, map(str.strip, errors))), daemon=True
        )
        self._errors.start()

    def call(self, what: str, seconds: float, arguments: dict[str, Any]) -> Any:
        """Ask for something, and wait for the answer. Raises NoAnswer."""
        self._number += 1
        with contextlib.suppress(OSError):  # one that has ended says why below
            self._requests.write(json.dumps({"id": self._number, "call": what, "arguments": arguments}) + "\n")
            self._requests.flush()
        while True:
            try:
                answer = self._answers.get(timeout=seconds)
            except queue.Empty:
                raise AgentError(f"no answer to `{what}` within {seconds:.0f} s") from None
            if answer is None:
                self._errors.join(2)
                if self._number > 1 and not self._said:
                    raise AgentError(f"{CONNECTION_LOST} (exit code {self._process.wait()})")
                raise AgentError(self._said[-1] if self._said else f"no answer: exit code {self._process.wait()}")
            if answer.get("id") == self._number:
                return answer["result"]

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            self._requests.close()
        try:
            self._process.wait(3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        for line in self._output:
            with contextlib.suppress(ValueError):  # what a login shell says
                answer = json.loads(line)
                if isinstance(answer, dict):
                    self._answers.put(answer)
        self._answers.put(None)


class AgentPool:
    """The agents of all nodes. A node that fails to answer is asked no more, and stands in `lost`."""

    def __init__(self, hosts: list[Host], command: Callable[[Host], list[str]]):
        self.hosts, self.command = hosts, command
        self.unreachable: dict[str, str] = {}
        """Nodes without an answer, and why."""
        self._pool = ThreadPoolExecutor(max(1, len(hosts)))
        self._agents = {host.name: Agent(command(host)) for host in hosts}

    @property
    def nodes(self) -> list[str]:
        """Those that answer, in the order of the hosts."""
        return [host.name for host in self.hosts if host.name not in self.unreachable]

    def call_nodes(
        self,
        what: str,
        seconds: float,
        arguments: Callable[[str], dict[str, Any]] = lambda node: {},
        nodes: Iterable[str] | None = None,
    ) -> dict[str, Any]:
        """Ask the nodes at once, all by default; what those answered that did. `arguments` gives what is asked of each."""
        asked = [node for node in self.nodes if nodes is None or node in set(nodes)]
        answers = self._pool.map(lambda node: self._ask(node, what, seconds, arguments(node)), asked)
        return {node: answer for node, answer in zip(asked, answers, strict=True) if node not in self.unreachable}

    def close(self) -> None:
        """End all agents."""
        with ThreadPoolExecutor(
            max(1, len(self._agents))
        ) as pool:  # the other one may be waiting for answers, which this ends
            list(pool.map(Agent.close, self._agents.values()))
        self._pool.shutdown()

    def _ask(self, node: str, what: str, seconds: float, arguments: dict[str, Any]) -> Any:
        try:
            return self._agents[node].call(what, seconds, arguments)
        except AgentError as error:
            self.unreachable[node] = str(error)
            return None


def local_command(host: Host) -> list[str]:
    """An agent on this machine."""
    return [sys.executable, "-m", MODULE]


def ssh_command(host: Host) -> list[str]:
    """An agent as DeepSpeed's pdsh launcher starts ranks: through ssh, in this folder, with this interpreter."""
    options = [
        word for name in ("PDSH_SSH_ARGS", "PDSH_SSH_ARGS_APPEND") for word in shlex.split(os.environ.get(name, ""))
    ]
    folder = os.getcwd()
    python_path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    start = shlex.join(["exec", "env", f"PYTHONPATH={python_path}", sys.executable, "-m", MODULE])
    bounds = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_TIMEOUT_SECONDS}"]
    return ["ssh", *options, *bounds, host.name, f"cd {shlex.quote(folder)} && {start}"]


def srun_command(host: Host) -> list[str]:
    """An agent as a step of the Slurm allocation, which hands on this folder and all environment variables."""
    return [
        "srun",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={host.name}",
        "--overlap",
        "--unbuffered",
        sys.executable,
        "-m",
        MODULE,
    ]
