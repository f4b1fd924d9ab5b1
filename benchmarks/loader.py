"""What the loader does a second: packing, planning, reading with every checksum, and tensors, beside a plain read of the same bytes.

    python benchmarks/loader.py [--rounds 5] > loader.json

One process and one thread, warm files. A corpus of records of one length is written for each kind; the loader then makes all micro batches of
a step as the only rank, without prefetching, so that the time is that of one core. Rounds of the loader and of plain reads of the same shards take
turns. Start-up is measured in a fresh process, on a corpus of 10^9 records whose manifest lists hard links to one shard. The share of the demo's
step is that of a short run of configs/demo.yaml on two processes. One JSON object goes to stdout, progress to stderr.
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

from data_prep.files import write_json
from data_prep.nlrx_grammar import generate
from data_prep.shards import FORMAT, MANIFEST, write_shard
from data_prep.tokenizer import Tokenizer, train

ROOT = Path(__file__).parent.parent
VOCABULARY = 512
VIEWS = ("text", "code")
KINDS = {"500": (250, 250, 2048), "26": (13, 13, 512)}
"""Tokens of a record -> of its views, and positions of a row."""
STEP_ROWS, MICRO_ROWS = 64, 16
BILLION = 10**9
SHARD_RECORDS = 100_000
TOKENS_PER_SECOND = {"500": 5e6, "26": 1.5e6}
START_SECONDS, START_BYTES, STEP_SHARE = 1.0, 300e6, 0.01


def main() -> None:
    """Parse the command line, measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8_000_000, help="of the corpora of which an epoch is timed")
    parser.add_argument("--demo-steps", type=int, default=60, help="0 leaves the demo out")
    parser.add_argument("--start-up", help=argparse.SUPPRESS)  # this process measures the start on that corpus
    arguments = parser.parse_args()
    if arguments.start_up:
        return start_up(arguments.start_up)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train([text for index in range(2000) for text in generate(0, "train", index)], VOCABULARY, folder / "tokenizer")
        kinds = {name: throughput(folder / name, *KINDS[name], arguments) for name in KINDS}
        start = start_of_a_billion(folder)
        share = demo_share(folder, arguments.demo_steps) if arguments.demo_steps else None
    print(json.dumps(report(kinds, start, share, arguments), indent=1))


def report(
    kinds: dict[str, dict], start: dict[str, float], share: dict[str, float] | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The JSON object."""
    targets = {
        f"tokens per second with {name}-token records": check_target(
            kinds[name]["tokens_per_second"]["median"], least=TOKENS_PER_SECOND[name]
        )
        for name in kinds
    }
    targets["start-up seconds"] = check_target(start["seconds"], most=START_SECONDS)
    targets["start-up bytes"] = check_target(start["bytes"], most=START_BYTES)
    if share is not None:
        targets["share of the demo's step spent waiting"] = check_target(share["waiting"], most=STEP_SHARE)
    return {
        "cores": 1,
        "rounds": arguments.rounds,
        "row_positions": {name: KINDS[name][2] for name in KINDS},
        "micro_batch_rows": MICRO_ROWS,
        "rows_per_step": STEP_ROWS,
        "objective": "llm_jepa, joint, 1 predictor token",
        "records": kinds,
        "start_up_of_a_billion_records": start,
        "demo_share": share,
        "targets": targets,
    }


def throughput(
    folder: Path, context: int, target: int, row_length: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Write a corpus of equal records, about; time the loader and plain reads of its shards in turns."""
    from pretrain.data.batch import micro_batches
    from pretrain.data.corpus import Corpus
    from pretrain.data.layout import Pairing, SpecialTokenIds, make_layout
    from pretrain.data.loader import Loader

    write_corpus(folder, context, target, arguments.tokens // (context + target), shard_records=10_000)
    specials = SpecialTokenIds(0, 2, 3, 4, VOCABULARY)
    corpus = Corpus(folder, "train")
    loader = Loader(corpus, make_layout("joint", specials, pairing=Pairing(1)), row_length, seed=1)
    shards = [folder / shard["file"] for shard in corpus.entry["shards"]]

    def load() -> int:
        """An epoch: windows are planned whole."""
        tokens, epoch = 0, loader.epoch
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
        say(
            f"{folder.name}-token records, round {number + 1}: {loads[-1]:,.0f} tokens/s, plain read {reads[-1]:,.0f} bytes/s"
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
    """What is done a second of this process, which has one thread."""
    started = time.process_time()
    done = work()
    return done / (time.process_time() - started)


def write_corpus(folder: Path, context: int, target: int, records: int, shard_records: int, links: int = 1) -> None:
    """Records whose views have about so many tokens, as `links` times the same shards."""
    shutil.copytree(folder.parent / "tokenizer", folder / "tokenizer")
    rng = np.random.default_rng(0)
    shards: list[dict[str, Any]] = []
    for first in range(0, records, shard_records):
        lengths = [
            rng.integers(mean - mean // 4, mean + mean // 4 + 1, min(shard_records, records - first))
            for mean in (context, target)
        ]
        views = {
            view: (rng.integers(5, VOCABULARY, of_view.sum()), of_view)
            for view, of_view in zip(VIEWS, lengths, strict=True)
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
        key: {view: how(shard[key][view] for shard in shards) for view in VIEWS}
        for key, how in (("tokens", sum), ("longest", max))
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
    """Seconds from a configuration to the first micro batches, and what memory grows by, in a fresh process."""
    corpus = folder / "billion"
    write_corpus(corpus, 13, 13, SHARD_RECORDS, SHARD_RECORDS, links=BILLION // SHARD_RECORDS)
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
        say(f"start-up: {starts[-1]}")
    return {key: statistics.median(start[key] for start in starts) for key in starts[0]}


def start_up(path: str) -> None:
    """Measure the start in this process; what is imported does not count."""
    from pretrain.config import load_config
    from pretrain.data.batch import micro_batches
    from pretrain.data.corpus import Corpus
    from pretrain.data.layout import SpecialTokenIds
    from pretrain.training.setup import check, make_loader

    config = load_config(path)
    specials = SpecialTokenIds(0, 2, 3, 4, VOCABULARY)
    before, started = resident_bytes(), time.perf_counter()
    corpus = Corpus(config.data.path, "train")
    check(config, corpus, say)
    loader = make_loader(config, corpus, config.objective.make_layout(specials, corpus.views, "all"))
    ready, grown = time.perf_counter() - started, resident_bytes() - before
    rows = loader.next_rows(STEP_ROWS)
    for _ in micro_batches(rows, corpus, loader.layout, specials, 512, micro_batch_rows=MICRO_ROWS, rank=0, ranks=1):
        pass
    print(
        json.dumps(
            {
                "records": len(corpus),
                "shards": len(corpus.entry["shards"]),
                "seconds": round(ready, 3),
                "bytes": grown,
                "seconds_to_the_first_step": round(time.perf_counter() - started, 3),
                "bytes_with_the_first_step": resident_bytes() - before,
            }
        )
    )


def resident_bytes() -> int:
    """The most that this process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def demo_share(folder: Path, steps: int) -> dict[str, float]:
    """Of a step of the demo on two processes: the share spent waiting for data, and the loader's time on its own thread."""
    from pretrain.config import load_config
    from pretrain.data.batch import micro_batches
    from pretrain.data.corpus import Corpus
    from pretrain.models.language_model import special_ids
    from pretrain.training.setup import make_loader

    overrides = [
        f"data.path={folder / 'demo'}",
        f"output_dir={folder}",
        f"train.steps={steps}",
        "train.epochs=null",
        "monitor.tensorboard=false",
    ]
    demo = ["configs/demo.yaml", *overrides]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    run = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        port,
        "--no_local_rank",
        "launcher/run.py",
    ]
    for command in ([sys.executable, "-m", "data_prep"], run):
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


def say(text: str) -> None:
    """Print a line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest over the rounds."""
    return {
        name: float(f"{of(values):.5g}") for name, of in (("median", statistics.median), ("min", min), ("max", max))
    }


def check_target(value: float, *, most: float = float("inf"), least: float = 0.0) -> dict[str, Any]:
    """A figure beside what it should be."""
    return {
        "measured": value,
        **({"at_most": most} if least == 0 else {"at_least": least}),
        "met": least <= value <= most,
    }


if __name__ == "__main__":
    main()
