"""A process that has imported what the commands import, and forks one process for each command under test.

Importing torch, transformers and DeepSpeed takes seconds; a fork of a process that has them takes milliseconds. A fork is a process like any
other: it has a session, an environment, an exit code and signals of its own. Only its imports are those of the warm process. Commands that
need other ones, and launchers, whose ranks start an interpreter anew, are started cold (tests/commands.py).
"""

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
IMPORTS = (
    "data_prep.pipeline",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which every engine imports, and with it torch's compiler
    "pretrain.evaluation.workers",
    "pretrain.evaluation.job",
    "pretrain.evaluation.task_evaluation",
    "pretrain.report.page",
    "pretrain.report.summary",
    "pretrain.studies.runner",
    "pretrain.training.dry_run",
    "pretrain.training.main",
    "pretrain.training.setup",
    "torch.utils.tensorboard",
    "transformers.models.gemma2.modeling_gemma2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.olmo2.modeling_olmo2",
)
SURVIVORS = {"jemalloc_bg_thd"}
"""Names of threads that are started again in a fork."""
MESSAGE_BYTES = 1 << 17
"""Largest request: arguments and environment of one command."""


class Command:
    """A command that runs in a fork of the warm process, with the interface of `subprocess.Popen`."""

    def __init__(self, arguments: list[str], environment: dict[str, str], stdout: IO[Any], stderr: IO[Any]):
        self.args, self.returncode = arguments, None
        self._reply, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps({"arguments": arguments, "environment": environment}).encode()
        with theirs, open(os.devnull) as nothing:
            descriptors = [nothing.fileno(), stdout.fileno(), stderr.fileno(), theirs.fileno()]
            socket.send_fds(_server(), [request], descriptors)
        self.pid = int(self._answer())

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the command runs."""
        if self.returncode is None and select.select([self._reply], [], [], 0)[0]:
            self.returncode = int(self._answer())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code. Raises subprocess.TimeoutExpired."""
        if self.returncode is None and not select.select([self._reply], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal, if the command still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _answer(self) -> bytes:
        answer = self._reply.recv(64)
        assert answer, "the warm process has died"
        return answer


_control: socket.socket | None = None


def _server() -> socket.socket:
    """Return the socket of the warm process, which is started with the first command and ends with this process."""
    global _control
    if _control is None:
        _control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "TRANSFORMERS_VERBOSITY": "error",
        }  # which commands set before they import transformers
        with theirs:
            subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
    return _control


class _Server:
    """Forks a process for each request and reports its exit code."""

    def __init__(self, control: socket.socket):
        self.control = control
        self.running: dict[int, tuple[int, socket.socket]] = {}
        """The process and the reply socket of each command, by the descriptor that becomes readable at its end."""

    def serve(self) -> dict[str, Any] | None:
        """Return the request in a fork, and None in the warm process when the tests have ended."""
        while True:
            ready, _, _ = select.select([self.control, *self.running], [], [])
            for descriptor in ready:
                if descriptor is not self.control:
                    self._report(descriptor)
                    continue
                request, descriptors, _, _ = socket.recv_fds(self.control, MESSAGE_BYTES, 4)
                if not request:
                    return self._end()
                if self._fork(descriptors):
                    return json.loads(request)

    def _fork(self, descriptors: list[int]) -> bool:
        """Return whether this is the fork; its standard streams are then the first three descriptors."""
        streams, reply = descriptors[:3], socket.socket(fileno=descriptors[3])
        pid = os.fork()
        if pid == 0:
            for number, descriptor in enumerate(streams):
                os.dup2(descriptor, number)
            for other in (self.control, reply, *(reply for _, reply in self.running.values())):
                other.close()
            for descriptor in (*streams, *self.running):
                os.close(descriptor)
            return True
        for descriptor in streams:
            os.close(descriptor)
        reply.send(str(pid).encode())
        self.running[os.pidfd_open(pid)] = pid, reply
        return False

    def _report(self, descriptor: int) -> None:
        pid, reply = self.running.pop(descriptor)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(descriptor)
        with reply, contextlib.suppress(BrokenPipeError):
            reply.send(str(code).encode())

    def _end(self) -> None:
        for pid, _ in self.running.values():
            for kill in (os.killpg, os.kill):  # a fork that was just made leads no group yet
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)


def _become(request: dict[str, Any], set_by_imports: dict[str, str]) -> None:
    """Turn this fork into the command of the request and run it."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(set_by_imports | request["environment"])
    draw_seeds()
    run(request["arguments"])


def draw_seeds() -> None:
    """Give this fork random numbers of its own, as a cold start has: equal ones would hide that a command sets no seed."""
    seed = int.from_bytes(os.urandom(4), "big")
    random.seed(seed)
    sys.modules["numpy"].random.seed(seed)
    sys.modules["torch"].manual_seed(seed)


def run(arguments: list[str]) -> None:
    """Run the arguments of a Python command line in this process: a script, `-m MODULE` or `-c CODE`, and its own arguments."""
    first, *rest = arguments
    if first == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        sys.path.insert(0, "")
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).absolute().parent))
        runpy.run_path(first, run_name="__main__")


def _main() -> None:
    server = _Server(socket.socket(fileno=int(sys.argv[1])))
    sys.path.pop(0)  # the folder of this file
    before = set(os.environ)
    for name in IMPORTS:
        importlib.import_module(name)
    set_by_imports = {name: value for name, value in os.environ.items() if name not in before}
    threads = {
        (task / "comm").read_text().strip()
        for task in Path("/proc/self/task").iterdir()
        if task.name != str(os.getpid())
    }
    assert threads <= SURVIVORS, f"an import has started {threads - SURVIVORS}: a thread that no fork would have"
    gc.collect()
    gc.freeze()  # a fork that collects garbage would copy the memory that it shares
    request = server.serve()
    if request is not None:
        del server
        _become(request, set_by_imports)


if __name__ == "__main__":
    _main()
