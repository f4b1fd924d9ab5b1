"""The command line as a user runs it, and small corpora on disk."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.sources import files

CHECKOUT = Path(__file__).resolve().parents[2]
WORDS = ["list", "all", "the", "names", "of", "dogs", "and", "cats", "in", "a", "town", "sorted", "by", "größe"]


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows whose targets all differ, within a seed and between seeds."""
    rng = random.Random(seed)
    return [{"text": " ".join(rng.choices(WORDS, k=rng.randint(2, 12))),
             "code": f"SELECT {' , '.join(rng.choices(WORDS, k=rng.randint(1, 4)))} FROM t{seed} WHERE id = {row}"}
            for row in range(count)]


@pytest.fixture(scope="session")
def lines_file() -> Callable[[Path, list], Path]:
    return write_lines


@pytest.fixture(scope="session")
def pairs() -> Callable[..., list[dict[str, str]]]:
    return make_pairs


@pytest.fixture(scope="session")
def command() -> Callable[..., tuple[list[str], dict[str, str]]]:
    """The command line of a preparation, and its environment."""
    def build(config: Path, *overrides: str) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-m", "data_prep", str(config), *overrides], os.environ | {"PYTHONPATH": str(CHECKOUT)}
    return build


@pytest.fixture(scope="session")
def run(command) -> Callable[..., subprocess.CompletedProcess]:
    def run(config: Path, *overrides: str, **options) -> subprocess.CompletedProcess:
        arguments, environment = command(config, *overrides)
        return subprocess.run(arguments, **{"env": environment, "capture_output": True, "text": True, "timeout": 120} | options)
    return run


@pytest.fixture(scope="session")
def mistake(run) -> Callable[..., str]:
    """Run a preparation that the user got wrong; return its message, which is one line, with exit code 2."""
    def mistake(config: Path, *overrides: str, **options) -> str:
        done = run(config, *overrides, **options)
        assert done.returncode == 2, done.stderr
        lines = done.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
        assert "Traceback" not in done.stdout
        return lines[0].removeprefix("error: ")
    return mistake


@pytest.fixture
def cut_small(monkeypatch) -> Callable[..., None]:
    """Let plain files be cut into pieces of so many bytes, and be read in blocks of so many."""
    def cut(piece: int, block: int = files.BLOCK) -> None:
        monkeypatch.setattr(files, "piece_length", lambda total: piece)
        monkeypatch.setattr(files, "BLOCK", block)
    return cut
