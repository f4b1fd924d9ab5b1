"""Throughput of the loader on one core, next to a plain read of the same bytes.

    python benchmarks/loader.py [--rounds 5] > loader.json

The loader packs, plans, reads with all checksums, and makes tensors. It runs in one process and one thread, on
files in the page cache. For each record size, a corpus of records of about that size is written. The loader then makes
all micro batches of a step as the only rank. It does not prefetch, so all of its time is spent on one core. Rounds
of the loader and of plain reads of the same shards alternate. Start-up is measured in fresh processes on a corpus
of 10^9 records, made of hard links to one shard. The fraction of a training step that is spent waiting for data is
measured in a short run of configs/demo.yaml on two processes. One JSON object is written to stdout, progress to stderr.
"""

import argparse
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_prep.make_tokenizer import train
from data_prep.nlrx_grammar import generate
from data_prep.shards import FORMAT, MANIFEST, write_shard
from data_prep.tokenizer import Tokenizer
from data_prep.utils.files import write_json

ROOT = Path(__file__).parent.parent
VOCABULARY = 512
VIEWS = ("text", "code")
RECORD_SIZES = {"500": (250, 250, 2048), "26": (13, 13, 512)}
"""Tokens of the first view, tokens of the second view, and positions of a row, by the tokens of a record."""
STEP_ROWS, MICRO_ROWS = 64, 16
START_UP_RECORDS = 10**9
SHARD_RECORDS = 100_000
MIN_TOKENS_PER_SECOND = {"500": 5e6, "26": 1.5e6}
MAX_START_SECONDS = 1.0
MAX_START_BYTES = 300e6
MAX_STEP_SHARE = 0.01


def main() -> None:
    """Parse the command line, measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tokens",
        type=int,
        default=8_000_000,
        help="number of tokens in each throughput corpus; a round reads it once",
    )
    parser.add_argument("--demo-steps", type=int, default=60, help="steps of the demo; 0 skips it")
    parser.add_argument("--start-up", help=argparse.SUPPRESS)  # configuration whose start-up this process measures
    arguments = parser.parse_args()
    if arguments.start_up:
        return start_up(arguments.start_up)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train([text for index in range(2000) for text in generate(0, "train", index)], VOCABULARY, folder / "tokenizer")
        throughputs = {size: throughput(folder / size, *RECORD_SIZES[size], arguments) for size in RECORD_SIZES}
        start = start_of_a_billion(folder)
        demo = demo_share(folder, arguments.demo_steps) if arguments.demo_steps else None
    print(json.dumps(report(throughputs, start, demo, arguments), indent=1))


def report(
    throughputs: dict[str, dict], start: dict[str, float], demo: dict[str, float] | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return the JSON object with all measurements and targets."""
    targets = {
        f"tokens per second with {name}-token records": check_target(
            throughputs[name]["tokens_per_second"]["median"], least=MIN_TOKENS_PER_SECOND[name]
        )
        for name in throughputs
    }
    targets["start-up seconds"] = check_target(start["seconds"], most=MAX_START_SECONDS)
    targets["start-up bytes"] = check_target(start["bytes"], most=MAX_START_BYTES)
    if demo is not None:
        targets["fraction of the demo's step spent waiting"] = check_target(demo["waiting"], most=MAX_STEP_SHARE)
    return {
        "cores": 1,
        "rounds": arguments.rounds,
        "row_positions": {name: RECORD_SIZES[name][2] for name in RECORD_SIZES},
        "micro_batch_rows": MICRO_ROWS,
        "rows_per_step": STEP_ROWS,
        "objective": "llm_jepa, joint, 1 predictor token",
        "records": throughputs,
        "start_up_of_a_billion_records": start,
        "demo_share": demo,
        "targets": targets,
    }


def throughput(
    folder: Path, context: int, target: int, row_length: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Write a corpus of records of about equal length, and time the loader and plain reads of the shards in rounds."""
    from data_prep.layout import Pairing, SpecialTokenIds, make_layout
    from pretrain.data.batch import micro_batches
    from pretrain.data.corpus import Corpus
    from pretrain.data.loader import Loader

    write_corpus(folder, context, target, arguments.tokens // (context + target), shard_records=10_000)
    specials = SpecialTokenIds(0, 2, 3, 4, VOCABULARY)
    corpus = Corpus(folder, "train")
    loader = Loader(corpus, make_layout("joint", specials, pairing=Pairing(1)), row_length, seed=1)
    shards = [folder / shard["file"] for shard in corpus.entry["shards"]]

    def load() -> int:
        """Load one epoch, because the loader plans complete windows, and return the number of tokens."""
        tokens = 0
        epoch = loader.epoch
        while loader.epoch == epoch:
            rows = loader.next_rows(STEP_ROWS)
            tokens += int(rows.lengths.sum())
            for _ in micro_batches(
                rows, corpus, loader.layout, specials, row_length, micro_batch_rows=MICRO_ROWS, rank=0, ranks=1
            ):
                pass
        return tokens

    def read() -> int:
        return sum(len(shard.read_bytes()) for shard in shards)

    load(), read()
    loads, reads = [], []
    for number in range(arguments.rounds):
        loads.append(rate(load))
        reads.append(rate(read))
        log(
            f"{folder.name}-token records, round {number + 1}: {loads[-1]:,.0f} tokens/s, "
            f"plain read {reads[-1]:,.0f} bytes/s"
        )
    bytes_per_token = corpus.entry["bytes"] / sum(corpus.entry["tokens"].values())
    return {
        "tokens_per_second": spread(loads),
        "records_per_second": round(statistics.median(loads) / (context + target)),
        "bytes_per_second": round(statistics.median(loads) * bytes_per_token),
        "plain_read_bytes_per_second": spread(reads),
        "of_plain_read": spread([load * bytes_per_token / read for load, read in zip(loads, reads, strict=True)]),
    }


def rate(work: Callable[[], int]) -> float:
    """Return the result of `work` divided by the CPU seconds that it took in this single-threaded process."""
    started = time.process_time()
    done = work()
    return done / (time.process_time() - started)


def write_corpus(folder: Path, context: int, target: int, records: int, shard_records: int, links: int = 1) -> None:
    """Write records whose views have about the given numbers of tokens, and list every shard `links` times."""
    shutil.copytree(folder.parent / "tokenizer", folder / "tokenizer")
    rng = np.random.default_rng(0)
    shards: list[dict[str, Any]] = []
    for first in range(0, records, shard_records):
        lengths = [
            rng.integers(mean - mean // 4, mean + mean // 4 + 1, min(shard_records, records - first))
            for mean in (context, target)
        ]
        views = {
            view: (rng.integers(5, VOCABULARY, view_lengths.sum()), view_lengths)
            for view, view_lengths in zip(VIEWS, lengths, strict=True)
        }
        shards.append(
            write_shard(
                folder / f"train-{len(shards):05d}.arrow", 0, views, np.zeros(len(lengths[0]), bool), VOCABULARY
            )
        )
    for number in range(len(shards), links * len(shards)):
        os.link(folder / shards[number % len(shards)]["file"], folder / f"train-{number:05d}.arrow")
        shards.append(shards[number % len(shards)] | {"file": f"train-{number:05d}.arrow"})
    totals = {key: sum(shard[key] for shard in shards) for key in ("records", "incomplete", "continued", "bytes")}
    by_view = {
        key: {view: reduction(shard[key][view] for shard in shards) for view in VIEWS}
        for key, reduction in (("tokens", sum), ("longest", max))
    }
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "views": VIEWS,
            "tokenizer": {"sha256": Tokenizer.load(folder / "tokenizer").fingerprint, "vocab_size": VOCABULARY},
            "sources": [{"weight": 1.0}],
            "settings": {"data": {"sequence_length": 512, "tokenizer": {"vocab_size": VOCABULARY}}, "files": {}},
            "splits": {
                "train": totals
                | by_view
                | {"positions_needed": max(shard["positions_needed"] for shard in shards), "shards": shards}
            },
            "dropped": {},
        },
    )


def start_of_a_billion(folder: Path) -> dict[str, float]:
    """Return the seconds and bytes of making the corpus and the loader, with and without the first micro batches.

    The values are medians of three fresh processes.
    """
    corpus = folder / "billion"
    write_corpus(corpus, 13, 13, SHARD_RECORDS, SHARD_RECORDS, links=START_UP_RECORDS // SHARD_RECORDS)
    config = folder / "billion.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "name": "billion",
                "output_dir": str(folder),
                "data": {"path": str(corpus), "sequence_length": 512, "tokenizer": {"vocab_size": VOCABULARY}},
                "model": {"family": "llama", "shape": str(ROOT / "configs/models/llama_tiny.yaml")},
                "objective": {"name": "llm_jepa"},
                "train": {
                    "epochs": 1,
                    "global_batch_rows": STEP_ROWS,
                    "micro_batch_rows": MICRO_ROWS,
                    "learning_rate": 1e-3,
                },
            }
        )
    )
    starts = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, __file__, "--start-up", str(config)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=ROOT,
        )
        starts.append(json.loads(done.stdout))
        log(f"start-up: {starts[-1]}")
    return {key: statistics.median(start[key] for start in starts) for key in starts[0]}


def start_up(path: str) -> None:
    """Print the seconds and bytes of a start-up in this process, without imports and loading the configuration."""
    from data_prep.layout import SpecialTokenIds
    from pretrain.config import load_config
    from pretrain.data.batch import micro_batches
    from pretrain.data.corpus import Corpus
    from pretrain.planning.plan import make_loader
    from pretrain.training.start_checks import check

    config = load_config(path)
    specials = SpecialTokenIds(0, 2, 3, 4, VOCABULARY)
    before, started = resident_bytes(), time.perf_counter()
    corpus = Corpus(config.data.path, "train")
    check(config, corpus)
    loader = make_loader(config, corpus, config.objective.make_layout(specials, corpus.views, "all"))
    start_seconds, start_bytes = time.perf_counter() - started, resident_bytes() - before
    rows = loader.next_rows(STEP_ROWS)
    for _ in micro_batches(rows, corpus, loader.layout, specials, 512, micro_batch_rows=MICRO_ROWS, rank=0, ranks=1):
        pass
    print(
        json.dumps(
            {
                "records": len(corpus),
                "shards": len(corpus.entry["shards"]),
                "seconds": round(start_seconds, 3),
                "bytes": start_bytes,
                "seconds_to_the_first_step": round(time.perf_counter() - started, 3),
                "bytes_with_the_first_step": resident_bytes() - before,
            }
        )
    )


def resident_bytes() -> int:
    """Return the peak resident memory of this process in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def demo_share(folder: Path, steps: int) -> dict[str, float]:
    """Return the fractions of a demo step for waiting for data and for the loader's CPU time, and the step's seconds.

    The demo runs on two processes.
    """
    from pretrain.config import load_config
    from pretrain.data.batch import micro_batches
    from pretrain.data.corpus import Corpus
    from pretrain.models.language_model import special_ids
    from pretrain.planning.plan import make_loader

    overrides = [
        f"data.path={folder / 'demo'}",
        f"output_dir={folder}",
        f"train.steps={steps}",
        "monitor.loggers=[]",
    ]
    demo = ["configs/demo.yaml", *overrides]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    launch_command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        port,
        "--no_local_rank",
        "launcher/run.py",
    ]
    for command in ([sys.executable, "-m", "data_prep"], launch_command):
        subprocess.run([*command, *demo], cwd=ROOT, stdout=sys.stderr, check=True)
    config = load_config(ROOT / demo[0], overrides)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "throughput/data_wait_fraction" in line and line["step"] > 1]

    corpus = Corpus(config.data.path, "train")
    specials = special_ids(corpus.tokenizer, VOCABULARY)
    loader = make_loader(config, corpus, config.objective.make_layout(specials, corpus.views, "all"))

    def load() -> int:
        for _ in range(steps):
            rows = loader.next_rows(config.train.global_batch_rows)
            for _ in micro_batches(
                rows,
                corpus,
                loader.layout,
                specials,
                loader.row_length,
                micro_batch_rows=config.train.micro_batch_rows,
                rank=0,
                ranks=2,
            ):
                pass
        return steps

    step_seconds = (logged[-1]["seconds"] - logged[0]["seconds"]) / (logged[-1]["step"] - logged[0]["step"])
    return {
        "waiting": round(statistics.median(line["throughput/data_wait_fraction"] for line in logged), 6),
        "loader_thread": round(1 / rate(load) / step_seconds, 6),
        "step_seconds": round(step_seconds, 4),
    }


def log(text: str) -> None:
    """Print a line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, minimum and maximum over the rounds."""
    return {
        name: float(f"{summarize(values):.5g}")
        for name, summarize in (("median", statistics.median), ("min", min), ("max", max))
    }


def check_target(value: float, *, most: float = float("inf"), least: float = 0.0) -> dict[str, Any]:
    """Return a measured value, its limit, and whether the value meets the limit."""
    return {
        "measured": value,
        **({"at_most": most} if least == 0 else {"at_least": least}),
        "met": least <= value <= most,
    }


if __name__ == "__main__":
    main()
