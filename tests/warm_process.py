"""The warm process: it has imported the packages of the commands, and forks one process for each command under test.

Importing torch, transformers and DeepSpeed takes seconds. Forking a process that has imported them takes milliseconds.
A fork is a normal process with its own session, environment, exit code and signals. It shares only the imports of the
warm process. Commands that need other imports are started cold, and so are launchers, because their ranks start new
interpreters (tests/commands.py).
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
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported by every engine; imports torch's compiler
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
RESTARTED_THREADS = {"jemalloc_bg_thd"}
"""Names of the threads that start again in a fork."""
MESSAGE_BYTES = 1 << 17
"""Maximum size of a request, which holds the arguments and environment of one command."""


class Command:
    """A command in a fork of the warm process, with the interface of `subprocess.Popen`."""

    def __init__(self, arguments: list[str], environment: dict[str, str], stdout: IO[Any], stderr: IO[Any]):
        self.args, self.returncode = arguments, None
        self._reply, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps({"arguments": arguments, "environment": environment}).encode()
        with server_end, open(os.devnull) as stdin:
            descriptors = [stdin.fileno(), stdout.fileno(), stderr.fileno(), server_end.fileno()]
            socket.send_fds(_server(), [request], descriptors)
        self.pid = int(self._answer())

    def poll(self) -> int | None:
        """Return the exit code, which is negative after a signal, or None while the command runs."""
        if self.returncode is None and select.select([self._reply], [], [], 0)[0]:
            self.returncode = int(self._answer())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the command exits, and return the exit code. Raises subprocess.TimeoutExpired."""
        if self.returncode is None and not select.select([self._reply], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal if the command still runs."""
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
    """Return the socket of the warm process. The first call starts it, and it ends with this process."""
    global _control
    if _control is None:
        _control, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The commands set these variables before they import transformers.
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "TRANSFORMERS_VERBOSITY": "error",
        }
        with server_end:
            subprocess.Popen(
                [sys.executable, __file__, str(server_end.fileno())],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[server_end.fileno()],
                start_new_session=True,
            )
    return _control


class _Server:
    """The part in the warm process: it forks a process for each request, and reports the exit code of each fork."""

    def __init__(self, control: socket.socket):
        self.control = control
        self.running: dict[int, tuple[int, socket.socket]] = {}
        """Process id and reply socket of each running command, by its pidfd, which is readable after the exit."""

    def serve(self) -> dict[str, Any] | None:
        """Serve requests. Return the request in each fork, and None in the warm process when the tests have ended."""
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
        """Fork, and return whether this is the fork. The first three descriptors become its standard streams."""
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
            for kill in (os.killpg, os.kill):  # a new fork does not lead a process group yet
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)


def _become(request: dict[str, Any], set_by_imports: dict[str, str]) -> None:
    """Run the command of the request in this fork."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(set_by_imports | request["environment"])
    draw_seeds()
    run(request["arguments"])


def draw_seeds() -> None:
    """Set random seeds in this fork, as a cold start does. Equal seeds would hide that a command sets no seed."""
    seed = int.from_bytes(os.urandom(4), "big")
    random.seed(seed)
    sys.modules["numpy"].random.seed(seed)
    sys.modules["torch"].manual_seed(seed)


def run(arguments: list[str]) -> None:
    """Run the arguments of a Python command line in this process.

    They begin with a script, `-m MODULE` or `-c CODE`.
    """
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
    imports = importlib.import_module("pretrain.imports")
    with imports.libraries(compiles=True):
        for name in IMPORTS:
            importlib.import_module(name)
    set_by_imports = {name: value for name, value in os.environ.items() if name not in before}
    threads = {
        (task / "comm").read_text().strip()
        for task in Path("/proc/self/task").iterdir()
        if task.name != str(os.getpid())
    }
    assert threads <= RESTARTED_THREADS, f"imports have started {threads - RESTARTED_THREADS}, which a fork would lack"
    gc.collect()
    gc.freeze()  # otherwise garbage collection in a fork would copy the shared memory
    request = server.serve()
    if request is not None:
        del server
        _become(request, set_by_imports)


if __name__ == "__main__":
    _main()
