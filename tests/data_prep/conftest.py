"""Fixtures that run the command line as a user does, and small corpora on disk."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.sources import files
from tests.processes import TIMEOUT
from tests.small_corpora import SEQUENCE_LENGTH, VOCAB_SIZE, json_source

NUM_FILES = 8
"""Number of JSON lines files of the fixture `corpus`."""
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
needs_mpi = pytest.mark.skipif(not MPIRUN, reason="mpirun is not installed")
REPO_ROOT = Path(__file__).resolve().parents[2]
WORDS = ["list", "all", "the", "names", "of", "dogs", "and", "cats", "in", "a", "town", "sorted", "by", "größe"]


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return rows whose targets are all different, also for different seeds."""
    rng = random.Random(seed)
    return [
        {
            "text": " ".join(rng.choices(WORDS, k=rng.randint(2, 12))),
            "code": f"SELECT {' , '.join(rng.choices(WORDS, k=rng.randint(1, 4)))} FROM t{seed} WHERE id = {row}",
        }
        for row in range(count)
    ]


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, list], Path]:
    return write_lines


@pytest.fixture(scope="session")
def pairs() -> Callable[..., list[dict[str, str]]]:
    return make_pairs


@pytest.fixture(scope="session")
def command() -> Callable[..., tuple[list[str], dict[str, str]]]:
    """Function that returns the command line and the environment of a preparation."""

    def build(config: Path, *overrides: str) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-m", "data_prep", str(config), *overrides], os.environ | {"PYTHONPATH": str(REPO_ROOT)}

    return build


@pytest.fixture(scope="session")
def run(command) -> Callable[..., subprocess.CompletedProcess]:
    def run(config: Path, *overrides: str, **options) -> subprocess.CompletedProcess:
        arguments, environment = command(config, *overrides)
        return subprocess.run(
            arguments, **{"env": environment, "capture_output": True, "text": True, "timeout": TIMEOUT} | options
        )

    return run


@pytest.fixture(scope="session")
def run_expecting_user_error(run) -> Callable[..., str]:
    """Function that runs a preparation, checks that it fails with exit code 2 and one line, and returns its message."""

    def run_expecting_user_error(config: Path, *overrides: str, **options) -> str:
        done = run(config, *overrides, **options)
        assert done.returncode == 2, done.stderr
        lines = done.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
        assert "Traceback" not in done.stdout
        return lines[0].removeprefix("error: ")

    return run_expecting_user_error


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, write_jsonl, pairs) -> Path:
    """Configuration of a corpus with many units, at least one per source, and with every reason to drop a record."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(NUM_FILES):
        rows = pairs(400, seed=index)
        rows[3] = {"text": "no code"}
        rows[5] = {"text": "long", "code": "SELECT name " * 200}
        rows[7 + index] = {"other": "column"}
        write_jsonl(folder / f"{index}.jsonl", rows)
        with open(folder / f"{index}.jsonl", "a", encoding="utf-8") as file:
            file.write(
                '\n{"text": [3], "code": "x"}\n{"messages": [{"role": "user", "content": "q"}, '
                '{"role": "assistant", "content": "SELECT a dog"}]}'
            )
    sources = [json_source(folder / f"{index}.jsonl") for index in range(NUM_FILES)]
    sources += [{"type": "nlrx", "records": 200, "seed": 5}, {"type": "nlrx", "records": 50, "split": "test"}]
    path = folder / "run.yaml"
    path.write_text(
        json.dumps(
            {
                "name": "x",
                "data": {
                    "path": str(folder / "out"),
                    "sources": sources,
                    "tokenizer": {"vocab_size": VOCAB_SIZE},
                    "on_malformed": "drop",
                    "sequence_length": SEQUENCE_LENGTH,
                    "validation_fraction": 0.1,
                    "workers": 1,
                },
            }
        )
    )
    return path


@pytest.fixture(scope="session")
def reference_corpus(corpus, run) -> Path:
    """Folder of the corpus, prepared by one process."""
    done = run(corpus)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (corpus.parent / "stdout.txt").write_text(done.stdout)
    return corpus.parent / "out"


@pytest.fixture
def set_piece_size(monkeypatch) -> Callable[..., None]:
    """Function that sets the piece size and the block size of plain files, in bytes."""

    def set_sizes(piece: int, block: int = files.BLOCK_BYTES) -> None:
        monkeypatch.setattr(files, "piece_length", lambda total: piece)
        monkeypatch.setattr(files, "BLOCK_BYTES", block)

    return set_sizes
