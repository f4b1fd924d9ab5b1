"""A pool of agents, one on every node, that are called in parallel.

Requests and answers are JSON lines over an agent's standard input and output, so no port has to be opened on a node. An
agent exits when its input closes. No agent therefore survives this process, even if this process is killed.
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
"""Timeout for the first answer of a node, in seconds. It includes starting Python, maybe from a slow file system."""
CONNECT_TIMEOUT_SECONDS = 10
"""ssh connect timeout, in seconds."""
CONNECTION_LOST = "the connection was lost"
"""Beginning of the error of a node that had answered before."""


class AgentError(Exception):
    """A failed call: the node cannot be reached, did not answer in time, or lost its connection."""


class Agent:
    """The client of one node's agent process."""

    def __init__(self, command: list[str]):
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._stderr_lines: deque[str] = deque(maxlen=20)
        self._request_id = 0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        requests, output, errors = self._process.stdin, self._process.stdout, self._process.stderr
        assert requests is not None and output is not None and errors is not None
        self._requests, self._output = requests, output
        threading.Thread(target=self._read, daemon=True).start()
        self._stderr_reader = threading.Thread(
            target=lambda: self._stderr_lines.extend(filter(None, map(str.strip, errors))), daemon=True
        )
        self._stderr_reader.start()

    def call(self, function: str, seconds: float, arguments: dict[str, Any]) -> Any:
        """Call a function of the agent and return its result. Raises AgentError after `seconds` without an answer."""
        self._request_id += 1
        with contextlib.suppress(OSError):  # if the process has exited, the reason is reported below
            self._requests.write(json.dumps({"id": self._request_id, "call": function, "arguments": arguments}) + "\n")
            self._requests.flush()
        while True:
            try:
                answer = self._answers.get(timeout=seconds)
            except queue.Empty:
                raise AgentError(f"no answer to `{function}` within {seconds:.0f} s") from None
            if answer is None:
                self._stderr_reader.join(2)
                if self._request_id > 1 and not self._stderr_lines:
                    raise AgentError(f"{CONNECTION_LOST} (exit code {self._process.wait()})")
                if self._stderr_lines:
                    raise AgentError(self._stderr_lines[-1])
                raise AgentError(f"no answer: exit code {self._process.wait()}")
            if answer.get("id") == self._request_id:
                return answer["result"]

    def close(self) -> None:
        """Close the agent's standard input, and kill the process if it does not exit within 3 s."""
        with contextlib.suppress(OSError):
            self._requests.close()
        try:
            self._process.wait(3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        for line in self._output:
            with contextlib.suppress(ValueError):  # a login shell may print other lines
                answer = json.loads(line)
                if isinstance(answer, dict):
                    self._answers.put(answer)
        self._answers.put(None)


class AgentPool:
    """The agents of all nodes. A node that fails to answer is added to `unreachable` and not called again."""

    def __init__(self, hosts: list[Host], command: Callable[[Host], list[str]]):
        self.hosts = hosts
        self.command = command
        self.unreachable: dict[str, str] = {}
        """Error of each node that did not answer."""
        self._pool = ThreadPoolExecutor(max(1, len(hosts)))
        self._agents = {host.name: Agent(command(host)) for host in hosts}

    @property
    def nodes(self) -> list[str]:
        """Nodes that answer, in the order of `hosts`."""
        return [host.name for host in self.hosts if host.name not in self.unreachable]

    def call_nodes(
        self,
        function: str,
        seconds: float,
        arguments: Callable[[str], dict[str, Any]] = lambda node: {},
        nodes: Iterable[str] | None = None,
    ) -> dict[str, Any]:
        """Call a function on the given nodes (default: all) in parallel, and return the results by node.

        `arguments` returns the arguments for a node. Nodes that do not answer within `seconds` have no result.
        """
        called = [node for node in self.nodes if nodes is None or node in set(nodes)]
        answers = self._pool.map(lambda node: self._call_node(node, function, seconds, arguments(node)), called)
        return {node: answer for node, answer in zip(called, answers, strict=True) if node not in self.unreachable}

    def close(self) -> None:
        """Close all agents."""
        # A separate pool: the threads of self._pool may be waiting for answers until the agents are closed.
        with ThreadPoolExecutor(max(1, len(self._agents))) as pool:
            list(pool.map(Agent.close, self._agents.values()))
        self._pool.shutdown()

    def _call_node(self, node: str, function: str, seconds: float, arguments: dict[str, Any]) -> Any:
        try:
            return self._agents[node].call(function, seconds, arguments)
        except AgentError as error:
            self.unreachable[node] = str(error)
            return None


def local_command(host: Host) -> list[str]:
    """Return the command that starts an agent on this machine."""
    return [sys.executable, "-m", MODULE]


def ssh_command(host: Host) -> list[str]:
    """Return the command that starts an agent like DeepSpeed's pdsh launcher starts ranks.

    It uses ssh, the working folder of this process and the same Python interpreter.
    """
    options = [
        word for name in ("PDSH_SSH_ARGS", "PDSH_SSH_ARGS_APPEND") for word in shlex.split(os.environ.get(name, ""))
    ]
    folder = os.getcwd()
    python_path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    start = shlex.join(["exec", "env", f"PYTHONPATH={python_path}", sys.executable, "-m", MODULE])
    noninteractive = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_TIMEOUT_SECONDS}"]
    return ["ssh", *options, *noninteractive, host.name, f"cd {shlex.quote(folder)} && {start}"]


def srun_command(host: Host) -> list[str]:
    """Return the command that starts an agent as a step of the Slurm allocation.

    Slurm passes on the working folder and all environment variables.
    """
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
