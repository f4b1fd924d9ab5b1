"""Speed of preparing a corpus with all phases, compared with the tokenizer alone on the same text.

    python benchmarks/prepare.py [--megabytes 128] [--rounds 3] > prepare.json

The text is JSON lines with the docstring/function pairs of Python's standard library, repeated with a different
number in each copy. A BPE tokenizer with 8,192 pieces is trained before the measurement and imported. `raw` is
sentencepiece's batch encoding of the same texts on one thread, without reading, writing or anything else. Every
method is timed once per round, and ratios are taken within a round: a temporary slowdown of the machine then
affects all methods. One JSON object is written to stdout, progress to stderr.
"""

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import sentencepiece

from data_prep.config import DataConfig, PythonSource
from data_prep.make_tokenizer import train
from data_prep.pipeline import prepare
from data_prep.sources import open_source
from data_prep.utils.config_file import validate

VIEWS = ("docstring", "code")
VOCABULARY = 8192
BATCH = 2000
"""Number of texts that sentencepiece encodes in one call."""
WORKERS = (1, 2)
OVER_RAW_TARGET = 0.85
"""Lower limit for the speed of preparation divided by the speed of raw encoding times the number of workers."""
SPEEDUP_TARGET = 1.8
"""Lower limit for the speedup from one worker to two."""


def main() -> None:
    """Parse the command line, measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=128, help="megabytes of text to prepare")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_corpus(folder / "pairs.jsonl", round(arguments.megabytes * 1e6))
        texts = read_texts(folder / "pairs.jsonl")
        train(iter(texts[:20_000]), VOCABULARY, folder / "tokenizer")
        records = len(texts) // 2
        log(f"{size / 1e6:.0f} MB of text in {records:,} records")
        rounds = [measure_round(folder, number, arguments.rounds) for number in range(1, arguments.rounds + 1)]
    print(json.dumps(report(rounds, size, records), indent=2))


def write_corpus(path: Path, text_bytes: int) -> int:
    """Write JSON lines of pairs with at least `text_bytes` bytes of text, and return the actual size."""
    reader = open_source(
        PythonSource(type="python", path=sysconfig.get_paths()["stdlib"]), VIEWS, "the standard library"
    )
    mined = (
        record.views
        for piece in reader.pieces()
        if "site-packages" not in piece.path
        for record in reader.read(piece)
        if record.views
    )
    pairs: list[tuple[str, ...]] = []
    size = copy = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < text_bytes:
            for docstring, code in pairs if copy else mined:
                if not copy:
                    pairs.append((docstring, code))
                row = {"docstring": docstring, "code": f"{code}\n# {copy}"}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                size += sum(len(text.encode()) for text in row.values())
                if size >= text_bytes:
                    break
            copy += 1
    return size


def read_texts(path: Path) -> list[str]:
    """Return all texts of a JSON lines file."""
    with open(path, encoding="utf-8") as file:
        return [text for line in file for text in json.loads(line).values()]


def measure_round(folder: Path, number: int, rounds: int) -> dict[str, float]:
    """Return the duration of each method in seconds."""
    seconds = {}
    for workers in WORKERS:
        seconds[f"raw_{workers}"] = raw_seconds(folder, workers)
        data = validate(
            DataConfig,
            {
                "path": str(folder / f"corpus-{workers}-{number}"),
                "views": list(VIEWS),
                "workers": workers,
                "sequence_length": 4096,
                "tokenizer": {"path": str(folder / "tokenizer" / "tokenizer.model")},
                "sources": [{"type": "json", "path": str(folder / "pairs.jsonl")}],
            },
        )
        seconds[f"prepare_{workers}"] = timed(functools.partial(prepare, data))
    log(f"round {number} of {rounds}: " + ", ".join(f"{method} {value:.1f} s" for method, value in seconds.items()))
    return seconds


def raw_seconds(folder: Path, workers: int) -> float:
    """Return the seconds that `workers` processes take to encode texts that are already in memory."""
    context = multiprocessing.get_context("spawn")
    ready, go = context.Barrier(workers + 1), context.Barrier(workers + 1)
    processes = [
        context.Process(target=encode_share, args=(folder, share, workers, ready, go)) for share in range(workers)
    ]
    for process in processes:
        process.start()
    ready.wait()
    started = time.perf_counter()
    go.wait()
    for process in processes:
        process.join()
    return time.perf_counter() - started


def encode_share(folder: Path, share: int, shares: int, ready: Barrier, go: Barrier) -> None:
    """Encode every `shares`-th text in batches, beginning with text number `share`."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "tokenizer.model"))
    texts = read_texts(folder / "pairs.jsonl")[share::shares]
    ready.wait()
    go.wait()
    for start in range(0, len(texts), BATCH):
        processor.encode(texts[start : start + BATCH], num_threads=1)


def timed(action: Callable[[], object]) -> float:
    """Run an action and return its duration in seconds."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def report(rounds: list[dict[str, float]], size: int, records: int) -> dict:
    """Return the JSON object: medians over the rounds, and medians of the ratios within a round."""
    over_raw = {
        workers: statistics.median(seconds["raw_1"] / workers / seconds[f"prepare_{workers}"] for seconds in rounds)
        for workers in WORKERS
    }
    speedup = {
        method: statistics.median(seconds[f"{method}_1"] / seconds[f"{method}_2"] for seconds in rounds)
        for method in ("prepare", "raw")
    }
    medians = {method: statistics.median(seconds[method] for seconds in rounds) for method in rounds[0]}
    return {
        "text_megabytes": round(size / 1e6, 1),
        "records": records,
        "rounds": len(rounds),
        "megabytes_per_second": {method: round(size / 1e6 / value, 4) for method, value in medians.items()},
        "prepare_over_raw_times_workers": {str(workers): round(ratio, 3) for workers, ratio in over_raw.items()},
        "speedup_of_2_workers": {method: round(ratio, 2) for method, ratio in speedup.items()},
        "targets": {
            **{
                f"prepare over raw times workers, {workers}": target(ratio, OVER_RAW_TARGET)
                for workers, ratio in over_raw.items()
            },
            "speedup of 2 workers": target(speedup["prepare"], SPEEDUP_TARGET),
        },
    }


def target(measured: float, at_least: float) -> dict[str, float | bool]:
    """Return a measured ratio, its target, and whether the ratio meets the target."""
    return {"measured": round(measured, 3), "at_least": at_least, "met": measured >= at_least}


def log(text: str) -> None:
    """Print a line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
