"""Slow tests (15 minutes): a corpus of two million records has the same bytes under mpirun and after twenty kills."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from data_prep.config import PythonSource
from data_prep.sources import open_source
from tests.data_prep.conftest import MPIRUN
from tests.processes import contents, kill_all

pytestmark = pytest.mark.slow
REPO_ROOT = Path(__file__).resolve().parents[2]
SHARED = REPO_ROOT.parent / "shared" / "data"
RECORDS = 2_000_000
KILLS = 20


@pytest.fixture(scope="module")
def large_config(tmp_path_factory) -> Path:
    """Configuration of two million records: word definitions, Python functions, and documents.

    The pairs are repeated in shuffled copies. The target ends in the number of the copy, except in 5% of the pairs.
    """
    if not (SHARED / "wordnet").exists():
        pytest.skip("needs ../shared/data")
    folder = tmp_path_factory.mktemp("big")
    rng = random.Random(0)
    synsets = [json.loads(line) for line in (SHARED / "wordnet" / "synsets.jsonl").read_text().splitlines()]
    pairs = [(synset["gloss"], ", ".join(synset["words"])) for synset in synsets]
    reader = open_source(PythonSource(type="python", path=sysconfig.get_paths()["stdlib"]), ("text", "code"), "source")
    pairs += [
        record.views
        for piece in reader.pieces()
        if "site-packages" not in piece.path
        for record in reader.read(piece)
        if record.views
    ]
    documents = (SHARED / "text" / "sqlite3-doc.txt").read_text()
    (folder / "documents.txt").write_text(documents)
    written = copy = 0
    while written < RECORDS:
        rng.shuffle(pairs)
        with open(folder / f"pairs-{copy:02d}.jsonl", "w") as file:
            for text, code in pairs[: RECORDS - written]:
                file.write(
                    json.dumps({"text": text, "code": code if rng.random() < 0.05 else f"{code} #{copy}"}) + "\n"
                )
                written += 1
        copy += 1
    config = folder / "run.yaml"
    config.write_text(
        json.dumps(
            {
                "name": "big",
                "data": {
                    "path": str(folder / "out"),
                    "tokenizer": {"vocab_size": 8000},
                    "sequence_length": 1024,
                    "validation_fraction": 0.01,
                    "workers": 2,
                    "sources": [
                        {"type": "json", "path": str(folder / "pairs-*.jsonl")},
                        {"type": "text", "path": str(folder / "documents.txt"), "separator": ""},
                    ],
                },
            }
        )
    )
    return config


def prepare(config: Path, out: Path, ranks: int) -> subprocess.Popen:
    command = [MPIRUN, "-n", ranks, sys.executable, "-m", "data_prep", config, f"data.path={out}"]
    return subprocess.Popen(
        list(map(str, command)),
        env=os.environ | {"PYTHONPATH": str(REPO_ROOT)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def reference(large_config) -> tuple[Path, float]:
    """A corpus that one process prepared, and the duration in seconds."""
    started = time.monotonic()
    process = prepare(large_config, large_config.parent / "one", 1)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return large_config.parent / "one", time.monotonic() - started


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_writes_the_same_bytes(large_config, reference, ranks, tmp_path):
    process = prepare(large_config, tmp_path / "out", ranks)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert f"in {ranks} MPI ranks" in output
    assert contents(tmp_path / "out") == contents(reference[0])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sum(source["records"] for source in manifest["sources"]) >= RECORDS
    assert manifest["dropped"]["duplicate"]["count"] > 10_000


def test_kills_at_random_times_leave_the_same_bytes(large_config, reference, tmp_path):
    rng = random.Random(1)
    _, seconds = reference
    killed = 0
    for _ in range(KILLS):
        process = prepare(large_config, tmp_path / "out", 2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(1, seconds / 8))
        kill_all(process)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed > KILLS // 2, "most kills came too late"
    process = prepare(large_config, tmp_path / "out", 2)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert contents(tmp_path / "out") == contents(reference[0])
