"""Starting the project's commands as its users do: real processes, real launchers."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from pretrain.training.background import single_process_environment
from tests.processes import TIMEOUT

ROOT = Path(__file__).parent.parent

TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # enlarged: in a model of tiny weights, an error of the mask or of positions would hardly show
}


def tiny_config(folder: Path, **changes) -> dict:
    """The plain values of a run of a tiny model on a small generated corpus; `section__key=value` changes one."""
    config = {
        "name": "run", "seed": 3, "output_dir": str(folder / "runs"),
        "data": {
            "path": str(folder / "corpus"), "sequence_length": 128, "tokenizer": {"vocab_size": 400}, "workers": 1, "deduplicate": "none",
            "sources": [{"type": "nlrx", "split": "train", "records": 600}, {"type": "nlrx", "split": "validation", "records": 60}],
        },
        "model": {"family": "llama", "shape": dict(TINY)},
        "objective": {"name": "llm_jepa", "distance": "info_nce", "weight": 0.5},
        "train": {"steps": 4, "global_batch_rows": 8, "micro_batch_rows": 4, "learning_rate": 3e-3},
        "monitor": {"log_every": 1, "validate_every": 100, "validation_records": 60},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    return config


def write_config(folder: Path, config: dict) -> Path:
    """The configuration as a file named after the run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config['name']}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def environment(**more: str) -> dict[str, str]:
    """One thread a rank, on CPU, this interpreter as `python`, and no trace of a launcher around the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return single_process_environment() | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def deepspeed_command(ranks: int, script: str | Path, *arguments: str | Path) -> list[str]:
    return [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port()),
            str(script), *map(str, arguments)]


def call(command: list[str], check: bool = True, timeout: float = TIMEOUT, **more: str) -> subprocess.CompletedProcess:
    """Run a command to its end; with `check`, fail showing what it printed."""
    done = subprocess.run(command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


class Running:
    """A command in the background that can be watched and killed."""

    def __init__(self, command: list[str], log: Path):
        self.log = log
        with open(log, "w") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT,
                                            start_new_session=True)

    def wait_until(self, condition, what: str) -> None:
        """Poll until the condition holds; fail if the command ends before."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self.process.poll() is None, f"the command ended before {what}:\n{self.log.read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"no {what} within {TIMEOUT} s:\n{self.log.read_text()[-4000:]}"
            time.sleep(0.02)

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, by rank."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        found = {}
        for child in children:
            with contextlib.suppress(psutil.Error):  # it has just ended
                rank = next((word.split("=")[1] for word in child.cmdline() if word.startswith("--local_rank=")), None)
                if rank is not None:
                    found[int(rank)] = child
        return [found[rank] for rank in sorted(found)]

    def kill(self) -> None:
        """SIGKILL every process of it at once."""
        for process in [*self.ranks(), *psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(TIMEOUT)

    def end(self) -> int:
        """Wait for its own end."""
        return self.process.wait(TIMEOUT)
