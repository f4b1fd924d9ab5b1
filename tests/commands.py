"""Helpers that start the project's commands as its users do: with real processes and real launchers.

A Python command starts warm, as a fork of a process that has imported everything (tests/warm_process.py), unless `cold`
is set. Launchers and their ranks start cold. `ranks_command` is the warm counterpart of DeepSpeed's launcher.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import psutil
import yaml

from pretrain.training.evaluation_requests import single_process_environment
from tests import warm_process
from tests.processes import TIMEOUT
from tests.ranks import free_port

ROOT = Path(__file__).parent.parent
READ_AT_IMPORT = {"PYTHONPATH", "PYTHONHASHSEED", "OMP_NUM_THREADS", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR"}
"""Variables that Python or the libraries read at import. A command that sets one of them starts cold."""

TINY_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # large: with tiny weights, a wrong mask or wrong positions would hardly change the loss
}


def tiny_config(folder: Path, **changes) -> dict:
    """Return the configuration of a run of a tiny model on a small generated corpus.

    `section__key=value` changes a value, and the value None removes the key.
    """
    config = {
        "name": "run",
        "seed": 3,
        "output_dir": str(folder / "runs"),
        "data": {
            "path": str(folder / "corpus"),
            "sequence_length": 128,
            "tokenizer": {"vocab_size": 400},
            "workers": 1,
            "deduplicate": "none",
            "sources": [
                {"type": "nlrx", "split": "train", "records": 600},
                {"type": "nlrx", "split": "validation", "records": 60},
            ],
        },
        "model": {"family": "llama", "shape": dict(TINY_SHAPE)},
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
    """Write the configuration to a file named after the run, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config['name']}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def read_complete_lines(path: Path) -> list[dict]:
    """Return the JSON values of a file's complete lines. A process may be writing the last line at the moment."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a command under test.

    It selects the CPU, one thread per rank and this interpreter as `python`. Variables of a launcher that started the
    tests are removed.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return (
        single_process_environment()
        | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path}
        | more
    )


def deepspeed_command(ranks: int, script: str | Path, *arguments: str | Path) -> list[str]:
    """Return a command with DeepSpeed's launcher, whose ranks start cold."""
    return [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
        str(script),
        *map(str, arguments),
    ]


def ranks_command(ranks: int, script: str | Path, *arguments: str | Path) -> list[str]:
    """Return a command that starts the same ranks warm, without DeepSpeed's launcher."""
    return ["python", "tests/ranks.py", str(ranks), str(script), *map(str, arguments)]


def start(
    command: list[str], output: IO[str], errors: IO[str], cold: bool = False, **more: str
) -> subprocess.Popen | warm_process.Command:
    """Start a command in its own session. `more` are environment variables in addition to `environment`."""
    program, *arguments = map(str, command)
    is_script = bool(arguments) and (arguments[0] in ("-m", "-c") or arguments[0].endswith(".py"))
    if program in ("python", sys.executable) and is_script and not cold and not READ_AT_IMPORT & more.keys():
        return warm_process.Command(arguments, environment(**more), output, errors)
    return subprocess.Popen(
        [program, *arguments],
        cwd=ROOT,
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        start_new_session=True,
    )


def run_command(
    command: list[str], check: bool = True, timeout: float = TIMEOUT, cold: bool = False, **more: str
) -> subprocess.CompletedProcess:
    """Run a command until it exits. With `check`, fail and show its output if its exit code is not 0."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = start(command, output, errors, cold, **more)
        try:
            code = process.wait(timeout)
        except BaseException:
            process.kill()
            raise
        printed = []
        for file in (output, errors):
            file.seek(0)
            printed.append(file.read())
    assert not check or code == 0, f"{command} ended with {code}:\n{printed[0][-4000:]}\n{printed[1][-4000:]}"
    return subprocess.CompletedProcess(command, code, *printed)


_prepared: dict[str, Path] = {}
"""Copies of the corpora that this process has prepared, with the settings that determine them as keys."""


def prepare_corpus(path: str | Path) -> None:
    """Prepare the corpus of a configuration, or copy an earlier one with the same settings."""
    config = yaml.safe_load(Path(path).read_text())
    corpus = Path(config["data"].pop("path"))
    settings = json.dumps([config["data"], config.get("evaluation")], sort_keys=True)
    if settings in _prepared:
        shutil.copytree(_prepared[settings], corpus)
    else:
        run_command(["python", "-m", "data_prep", str(path)])
        _prepared[settings] = shutil.copytree(corpus, Path(tempfile.mkdtemp(dir=corpus.parent)) / "copy")


def rank_of(process: psutil.Process) -> int | None:
    """Return the rank of a training process, or None if the process is not one."""
    name = process.name()
    if name.startswith("rank "):  # tests/ranks.py
        return int(name.removeprefix("rank "))
    return next((int(word.split("=")[1]) for word in process.cmdline() if word.startswith("--local_rank=")), None)


class BackgroundCommand:
    """A command in the background that can be watched and killed."""

    def __init__(self, command: list[str], log: Path, cold: bool = False, **more: str):
        self.log = log
        with open(log, "w") as output:
            self.process = start(command, output, output, cold, **more)

    def wait_until(self, condition, event: str) -> None:
        """Poll until the condition holds; fail if the command exits before that. `event` names the condition."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self.process.poll() is None, f"the command ended before {event}:\n{self.log.read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"no {event} within {TIMEOUT} s:\n{self.log.read_text()[-4000:]}"
            time.sleep(0.02)

    def ranks(self) -> list[psutil.Process]:
        """Return the training processes, in the order of their ranks."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        by_rank = {}
        for child in children:
            with contextlib.suppress(psutil.Error):  # it has just ended
                rank = rank_of(child)
                if rank is not None:
                    by_rank[rank] = child
        return [by_rank[rank] for rank in sorted(by_rank)]

    def kill(self) -> None:
        """Send SIGKILL to all processes of the command."""
        processes: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            started = psutil.Process(self.process.pid)
            processes = [*self.ranks(), *started.children(recursive=True), started]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(TIMEOUT)

    def end(self) -> int:
        """Wait until the command exits, and return its exit code."""
        return self.process.wait(TIMEOUT)
