"""Twelve checks of the project on GPUs, most important first: correctness, speed and memory.

    python benchmarks/gpu.py [--ranks 8] [--checks train head ...] [--seconds 600] [--work FOLDER] > gpu.json

All checks together take at most ten minutes on one GPU. Each check is a separate process with a time limit and a
log in the work folder. The next checks run even if a check fails. Each check prints a line to stderr with its
result, its figures and their meaning. The results are:

- `pass` or `fail`: the check was judged
- `ran`: the check was not judged, because there is nothing to compare with, or no GPU
- `broken`: the check ended without figures
- `none`: the check did not start: no time was left, or it needs a GPU or the figures of another check

One JSON object is written to stdout, and to results.json in the work folder after each check. The exit code is 1 if
a check failed or broke, or if one did not start on a GPU. Training runs use all GPUs (or --ranks of them), with one
rank on each, and as many rows as fit according to --dry-run, which estimates that a GPU needs about 30 GB.
`--small` uses a tiny model to test this command on CPU; its figures are meaningless.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parent.parent
PINNED = ("torch", "deepspeed", "transformers")
LLAMA_1B = ROOT / "configs" / "models" / "llama_1b.yaml"
GEMMA = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "next_token": {"name": "next_token"},
    "joint": {"name": "llm_jepa", "distance": "info_nce", "weight": 0.1},
    "joint, half": {"name": "llm_jepa", "distance": "info_nce", "weight": 0.1, "dropout": 0.5},
    "independent": {"name": "llm_jepa", "distance": "info_nce", "weight": 0.1, "layout": "independent"},
    "tube": {"name": "semantic_tube", "weight": 0.02},
}
PROFILED_STEP = 7
BUSY = 0.85
"""Smallest accepted fraction of a step in which the GPU computes."""
STOPPED = (75, 1)
"""Exit codes of a run that was stopped by a signal: the code of the run, and the code of torchrun."""
FILLED = 0.85
"""Fraction of a GPU's memory below which an estimate is considered to fit."""


class Failed(Exception):
    """An error for a check that ended without figures."""


@dataclass
class Bench:
    """State that the checks share: folder, ranks, time and results."""

    folder: Path
    ranks: int
    small: bool
    deadline: float
    memory: float | None = None
    """Memory of the smallest GPU, in bytes."""
    rows: int = 2
    """Rows of a micro batch."""
    log: Path = Path()
    limit: float = 0.0
    """Time limit of the current check, in seconds."""
    ends: float = 0.0
    """Time (time.monotonic()) at which the current check must end."""
    process: subprocess.Popen[bytes] | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of positions of a row."""
        return 256 if self.small else 4096

    def write_config(self, name: str, **changes: Any) -> Path:
        """Write the configuration of a run and return its path.

        The default is Llama 1B in bf16, or a tiny model. A keyword changes a whole section, or a single key as
        section__key.
        """
        steps = 4 if self.small else 10
        config: dict[str, Any] = {
            "name": name,
            "output_dir": str(self.folder / "runs"),
            "seed": 1,
            "data": {
                "path": str(self.folder / "data"),
                "views": ["context", "target"],
                "missing_views": "keep",
                "deduplicate": "none",
                "validation_fraction": 0.05,
                "tokenizer": {"path": str(self.folder / "corpus")},
                "sequence_length": self.length,
                "sources": [{"type": "json", "path": str(self.folder / "corpus" / "records.jsonl")}],
            },
            "model": {"family": "llama", "shape": TINY if self.small else yaml.safe_load(LLAMA_1B.read_text())},
            "objective": OBJECTIVES["joint"],
            "train": {
                "steps": steps,
                "global_batch_rows": 4 * self.rows * self.ranks,
                "micro_batch_rows": self.rows,
                "learning_rate": 3e-4,
                "warmup_fraction": 0.2,
                "precision": "bf16",
            },
            "checkpoint": {"every": 10**6, "keep": 1},
            "monitor": {"log_every": 1, "validate_every": 10**6, "validation_records": 40, "loggers": []},
        }
        for key, value in changes.items():
            section, _, inner = key.partition("__")
            if inner:
                config.setdefault(section, {})[inner] = value
            else:
                config[section] = value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def call(
        self, command: list[str], expected: tuple[int, ...] = (0,), stop_after: Callable[[], bool] | None = None
    ) -> str:
        """Run a command until the time of the check is used up, and return its output.

        If `stop_after` is given, signal one of the ranks to stop once it returns true.
        """
        with open(self.log, "ab+") as log:
            begin = log.tell()
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment()
            )
            stopped = stop_after is None
            try:
                while self.process.poll() is None:
                    if time.monotonic() > self.ends:
                        raise Failed(f"not finished within {self.limit:.0f} s")
                    if not stopped and stop_after and stop_after():
                        ranks_of(self.process)[0].send_signal(signal.SIGUSR1)
                        stopped = True
                    time.sleep(0.2)
            finally:
                kill_process_tree(self.process)
            log.seek(begin)
            printed = log.read().decode(errors="replace")
        if self.process.returncode not in expected:
            lines = [line.strip() for line in printed.splitlines() if line.strip()]
            error = next((line for line in reversed(lines) if "Error" in line or "error:" in line), lines[-1])
            raise Failed(f"exit code {self.process.returncode}: {error[:200]}")
        return printed

    def python(self, *words: Any) -> Any:
        """Run a script and return the JSON object of its last line."""
        return json.loads(last_json(self.call([sys.executable, *map(str, words)])))

    def train(self, *configs: Path, profile: int | None = None) -> dict[str, Any]:
        """Train runs on all ranks one after another; return the results of benchmarks/gpu_runs.py by name."""
        words = ["benchmarks/gpu_runs.py", *map(str, configs), *(["--profile", str(profile)] if profile else [])]
        launcher = (
            [] if self.ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        )
        results: dict[str, Any] = self.python(*launcher, *words)
        return results


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the training processes of a command that runs or starts launcher/run.py."""
    started = psutil.Process(process.pid)
    commands = {process: process.cmdline() for process in [started, *started.children(recursive=True)]}
    return [
        process
        for process, words in commands.items()
        if "launcher/run.py" in words and "torch.distributed.run" not in words
    ]


def kill_process_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and all its descendants, including processes in other sessions."""
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid)
        for descendant in [*started.children(recursive=True), started]:
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
    process.wait()


def environment() -> dict[str, str]:
    """Return the environment of a check."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def last_json(printed: str) -> str:
    """Return the last line that is a JSON object."""
    return next(line for line in reversed(printed.splitlines()) if line.startswith("{"))


Result = tuple[dict[str, Any], bool | None, str]
"""Figures of a check, whether the check passed (None if it was not judged), and the meaning of the figures."""


def check_corpus(bench: Bench) -> Result:
    """Prepare documents and pairs of 200 to 4,096 tokens with a vocabulary of 128,000 words."""
    records, words = (400, 1000) if bench.small else (6000, 128_000)
    bench.call(
        [
            sys.executable,
            "benchmarks/gpu_corpus.py",
            str(bench.folder / "corpus"),
            "--records",
            str(records),
            "--words",
            str(words),
            "--longest",
            str(bench.length),
        ]
    )
    bench.call([sys.executable, "-m", "data_prep", str(bench.write_config("corpus"))])
    split = json.loads((bench.folder / "data" / "manifest.json").read_text())["splits"]["train"]
    estimates = estimated_bytes(bench, (1, 2, 4))
    if bench.memory:
        bench.rows = max((rows for rows, needed in estimates.items() if needed < FILLED * bench.memory), default=1)
    figures = {
        "records": split["records"],
        "tokens": sum(split["tokens"].values()),
        "rows_of_a_micro_batch": bench.rows,
    }
    return figures | {"estimated_bytes": estimates}, True, "the corpus of the runs"


def estimated_bytes(bench: Bench, rows: tuple[int, ...]) -> dict[int, float]:
    """Return the estimated bytes of a rank on CUDA, as in --dry-run, for several numbers of rows of a micro batch."""
    results = bench.python("-c", ESTIMATE, bench.write_config("estimate"), bench.ranks, *rows)
    return {int(number): needed for number, needed in results.items()}


def check_attention(bench: Bench) -> Result:
    """Compare FlexAttention with dense attention in fp32."""
    cases = bench.python("benchmarks/gpu_kernels.py", "attention")
    failed = [name for name, case in cases.items() if "error" in case]
    worst = max(
        (max(case["error_of_output"], case["error_of_gradients"]) for case in cases.values() if "error" not in case),
        default=math.inf,
    )
    slowest_mask = max((case["mask_milliseconds"] for case in cases.values() if "error" not in case), default=math.inf)
    figures = {"worst_error": worst, "slowest_mask_milliseconds": slowest_mask, "failed": failed, "cases": cases}
    return (
        figures,
        not failed and worst < 2e-2 and slowest_mask < 5,
        "errors in bf16 are below 0.02, and a mask takes less than 5 ms",
    )


def check_train(bench: Bench) -> Result:
    """Train Llama 1B under ZeRO-3."""
    results = bench.train(bench.write_config("train"), profile=PROFILED_STEP)["train"]
    figures = run_figures(results)
    passed = figures["finite"] and figures["last_loss"] < figures["first_loss"] and not results["graphs_after_settling"]
    profile = results["profile"]
    figures |= {"graphs_after_settling": results["graphs_after_settling"], "profile": profile}
    meaning = "the loss falls, and nothing compiles after step 2"
    if not bench.memory:
        return figures, None if passed else False, meaning
    busy = profile.get("busy_share", 0.0)
    figures |= {"busy_share": busy, "fused_optimizer": results["fused_optimizer"]}
    return (
        figures,
        passed and busy > BUSY and results["fused_optimizer"],
        f"{meaning}; the GPU computes in {BUSY:.0%} of a step; AdamW is fused",
    )


def check_head(bench: Bench) -> Result:
    """Time the output head for several chunk sizes."""
    sizes = bench.python("benchmarks/gpu_kernels.py", "head", *(["--small"] if bench.small else []))
    errors = [size["error_of_weight_gradient"] for size in sizes.values()]
    fastest = min(sizes, key=lambda name: sizes[name]["milliseconds"])
    return (
        {"fastest": fastest, **sizes[fastest], "sizes": sizes},
        max(errors) < 5e-3 and max(errors) < 1.2 * min(errors),
        "the error of the weight gradient is independent of the number of chunks",
    )


def check_compiled(bench: Bench) -> Result:
    """Train Llama 1B under ZeRO stage 1 with compiled layers."""
    path = bench.write_config("compiled", deepspeed={"zero_optimization": {"stage": 1}}, train__compile=not bench.small)
    results = bench.train(path)["compiled"]
    figures = run_figures(results) | {"graph_breaks": results["graph_breaks"]}
    uncompiled = bench.results.get("train", {}).get("figures", {}).get("tokens_per_second")
    ratio = figures["tokens_per_second"] / uncompiled if uncompiled else None
    judged = ratio is not None and not bench.small
    return (
        figures | {"of_train": ratio},
        figures["finite"] and not results["graph_breaks"] and ratio > 1 if judged and ratio else None,
        "compiled layers with stage 1 are faster than the run of `train`, without graph breaks"
        if judged
        else "compiled layers with stage 1, not compared",
    )


def check_objectives(bench: Bench) -> Result:
    """Compare each layout of the JEPA term with next-token training on the same records."""
    paths = {
        name: bench.write_config(f"objective-{number}", objective=objective)
        for number, (name, objective) in enumerate(OBJECTIVES.items())
    }
    results = bench.train(*paths.values())
    figures: dict[str, Any] = {name: run_figures(results[path.stem]) for name, path in paths.items()}
    base = figures["next_token"]["records_per_second"]
    for run_values in figures.values():
        run_values["seconds_a_record_of_next_token"] = base / run_values["records_per_second"]
        run_values["seconds_a_position_of_next_token"] = (
            figures["next_token"]["positions_per_second"] / run_values["positions_per_second"]
        )
    ratios = {name: run_values["seconds_a_record_of_next_token"] for name, run_values in figures.items()}
    passed = all(run_values["finite"] for run_values in figures.values())
    dearest = max(run_values["seconds_a_position_of_next_token"] for run_values in figures.values())
    return (
        ratios | {"dearest_position": dearest, "runs": figures},
        (None if passed else False) if bench.small else passed and dearest < 1.15,
        "seconds per record, relative to next-token training; a position costs at most 15% more",
    )


def check_memory(bench: Bench) -> Result:
    """Compare the peak memory of as many rows as fit with the estimate of --dry-run."""
    estimates = estimated_bytes(bench, (bench.rows, 2 * bench.rows))
    rows = max(
        (rows for rows, needed in estimates.items() if bench.memory and needed < FILLED * bench.memory),
        default=bench.rows,
    )
    path = bench.write_config(
        "memory", train__micro_batch_rows=rows, train__global_batch_rows=rows * bench.ranks, train__steps=3
    )
    peak = bench.train(path)["memory"].get("peak_bytes")
    share = None if peak is None else peak / estimates[rows]
    figures = {
        "rows_of_a_micro_batch": rows,
        "estimate_bytes": estimates[rows],
        "peak_bytes": peak,
        "peak_of_estimate": share,
    }
    return figures, None if share is None else share < 1.1, "the peak is at most 10% above the estimate"


ESTIMATE = """
import json, sys
from pretrain.config import load_config
from pretrain.planning.rank_memory import model_states_per_rank, non_state_memory
from pretrain.training.dry_run import checked_plan
path, ranks, *rows = sys.argv[1:]
results = {}
for number in map(int, rows):
    overrides = [f"train.micro_batch_rows={number}", f"train.global_batch_rows={number * int(ranks)}"]
    plan = checked_plan(load_config(path, overrides), int(ranks))
    states = model_states_per_rank(plan, int(plan.zero.stage), int(ranks))
    results[number] = max(states.held + sum(whole for _, whole, _ in non_state_memory(plan, "cuda")), states.in_step)
print(json.dumps(results))
"""


def check_pieces(bench: Bench) -> Result:
    """Time the optimizer step, the copy of a checkpoint and the monitors."""
    figures = bench.python("benchmarks/gpu_kernels.py", "pieces", *(["--small"] if bench.small else []))
    faster = figures["adamw_foreach_milliseconds"] / figures["adamw_fused_milliseconds"]
    slowest = max(value for name, value in figures.items() if name.startswith("monitors"))
    passed = figures["copies_are_unchanged"]
    return (
        {"fused_adamw_is_faster_by": faster, **figures},
        (None if passed else False) if bench.small else passed and faster > 1.5 and slowest < 0.5,
        "a checkpoint copy does not change with the weights, fused AdamW is 1.5 times as fast, "
        "and monitors take less than half a second",
    )


def check_stop(bench: Bench) -> Result:
    """Send a stop signal to one of the ranks of a run: all ranks must save and exit."""
    path = bench.write_config("stop", train__steps=10**5, checkpoint__every=5, model__shape=TINY, monitor__log_every=1)
    metrics = bench.folder / "runs" / "stop" / "metrics.jsonl"
    bench.call(
        training_command(bench, path),
        STOPPED,
        stop_after=lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 6,
    )
    return stopped_figures(bench, path), is_resumable(bench, path), "a stopped run has a checkpoint of its last step"


def stopped_figures(bench: Bench, path: Path) -> dict[str, Any]:
    """Return the number of steps that a run has logged, and the step of its newest checkpoint."""
    run_dir = bench.folder / "runs" / path.stem
    newest = max(
        (int(folder.name.removeprefix("step-")) for folder in (run_dir / "checkpoints").glob("step-*")), default=0
    )
    return {"steps": len((run_dir / "metrics.jsonl").read_text().splitlines()), "checkpoint": newest}


def is_resumable(bench: Bench, path: Path) -> bool:
    """Return whether the status of a run is `resumable` and there is a checkpoint of its last step."""
    status = json.loads((bench.folder / "runs" / path.stem / "status.json").read_text())
    figures = stopped_figures(bench, path)
    return status["status"] == "resumable" and figures["steps"] == figures["checkpoint"]


def check_resume(bench: Bench) -> Result:
    """Restart the stopped run: it must resume at the next step, and its loss must not jump."""
    path, metrics = bench.folder / "stop.yaml", bench.folder / "runs" / "stop" / "metrics.jsonl"
    before = [json.loads(line) for line in metrics.read_text().splitlines()]
    wanted = len(before) + 6
    bench.call(
        training_command(bench, path), STOPPED, stop_after=lambda: len(metrics.read_text().splitlines()) > wanted
    )
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    jump = lines[len(before)]["loss/lm"] - before[-1]["loss/lm"]
    steps = [line["step"] for line in lines]
    passed = steps == list(range(1, len(steps) + 1)) and abs(jump) < 0.5 and is_resumable(bench, path)
    return {"jump_of_the_loss": jump}, passed, "no step is lost or repeated, and the loss does not jump"


def check_gemma2(bench: Bench) -> Result:
    """Train and validate Gemma 2, which uses soft-capping and a sliding window."""
    shape = TINY | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64} if bench.small else GEMMA
    path = bench.write_config(
        "gemma2", model={"family": "gemma2", "shape": shape}, train__steps=3, monitor__validate_every=1
    )
    results = bench.train(path)["gemma2"]
    figures = run_figures(results) | {"graphs_after_settling": results["graphs_after_settling"]}
    return (
        figures,
        figures["finite"] and not results["graphs_after_settling"],
        "the losses are finite, and nothing compiles after step 2",
    )


def check_accumulation(bench: Bench) -> Result:
    """Compare the gradient norms of one step of 64 micro steps, accumulated in bf16 and in fp32."""
    shape = TINY if bench.small else yaml.safe_load(LLAMA_1B.read_text()) | {"num_hidden_layers": 4}
    paths = [
        bench.write_config(
            f"accumulated-{dtype}",
            model__shape=shape,
            train__steps=1,
            train__micro_batch_rows=1,
            train__global_batch_rows=64 * bench.ranks,
            deepspeed={"data_types": {"grad_accum_dtype": dtype}},
        )
        for dtype in ("fp32", "bf16")
    ]
    results = bench.train(*paths)
    fp32, bf16 = (results[path.stem]["metrics"][0]["optimizer/grad_norm"] for path in paths)
    return (
        {"fp32": fp32, "bf16": bf16, "difference": bf16 / fp32 - 1},
        None,
        "the error of accumulating gradients in bf16",
    )


def run_figures(results: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a run: losses, and the median speed of the steps after the first two."""
    lines = results["metrics"]
    timed_lines = [line for line in lines[2:] if "throughput/tokens_per_second" in line] or lines[-1:]

    def median(tag: str) -> float | None:
        values = sorted(line[tag] for line in timed_lines if tag in line)
        return values[len(values) // 2] if values else None

    losses = [line["loss/lm"] for line in lines]
    return {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "finite": all(map(math.isfinite, losses)),
        "tokens_per_second": median("throughput/tokens_per_second"),
        "records_per_second": median("throughput/records_per_second"),
        "positions_per_second": positions_per_second(lines),
        "mfu": median("throughput/mfu"),
        "peak_gib": results["peak_bytes"] / 2**30 if "peak_bytes" in results else None,
    }


def positions_per_second(lines: list[dict[str, Any]]) -> float | None:
    """Return the positions per second, without padding, of the steps after the first step."""
    if len(lines) < 2:
        return None
    return (lines[-1]["positions"] - lines[0]["positions"]) / (lines[-1]["seconds"] - lines[0]["seconds"])


def training_command(bench: Bench, path: Path) -> list[str]:
    """Return the command with which a user starts a run."""
    launcher = (
        [] if bench.ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={bench.ranks}"]
    )
    return [sys.executable, *launcher, "launcher/run.py", str(path)]


CHECKS: dict[str, tuple[Callable[[Bench], Result], float, tuple[str, ...]]] = {
    "corpus": (check_corpus, 60, ()),
    "attention": (check_attention, 120, ()),
    "train": (check_train, 110, ("corpus",)),
    "head": (check_head, 40, ()),
    "compiled": (check_compiled, 110, ("corpus",)),
    "objectives": (check_objectives, 150, ("corpus",)),
    "memory": (check_memory, 70, ("corpus",)),
    "pieces": (check_pieces, 40, ()),
    "stop": (check_stop, 60, ("corpus",)),
    "resume": (check_resume, 60, ("corpus", "stop")),
    "gemma2": (check_gemma2, 70, ("corpus",)),
    "accumulation": (check_accumulation, 70, ("corpus",)),
}
"""Check functions by name, most important first, with their time limits in seconds and the checks that they need."""
GPU_ONLY = {"attention"}
"""Names of the checks that need a GPU."""


def main() -> None:
    """Run the checks and print their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=positive_int, help="GPUs to train on; default: all")
    parser.add_argument(
        "--checks",
        nargs="+",
        choices=CHECKS,
        default=list(CHECKS),
        metavar="NAME",
        help=f"checks to run, in this order: {', '.join(CHECKS)}; the checks they need are included",
    )
    parser.add_argument(
        "--seconds",
        type=positive_seconds,
        default=600.0,
        help="time for all checks; a check starts only if a third of its time limit is left (default: 600)",
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu", help="folder of logs and runs")
    parser.add_argument("--small", action="store_true", help="use a tiny model, also on CPU, to test this command")
    arguments = parser.parse_args()
    machine = describe_machine()
    if not machine["gpus"] and not arguments.small:
        parser.error("torch finds no GPU: use --small to test this command with a tiny model")
    if machine["gpus"] and (arguments.ranks or 1) > len(machine["gpus"]):
        parser.error(f"--ranks: {arguments.ranks} ranks need as many GPUs, but there are {len(machine['gpus'])}")
    folder = arguments.work.absolute() / time.strftime("%Y%m%d-%H%M%S")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        parser.error(f"--work: cannot create {folder}: {error.strerror}")
    memory = min((gpu["bytes"] for gpu in machine["gpus"]), default=None)
    bench = Bench(
        folder,
        arguments.ranks or max(1, len(machine["gpus"])),
        arguments.small,
        time.monotonic() + arguments.seconds,
        memory,
    )
    for line in machine_lines(machine, bench):
        print(line, file=sys.stderr, flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # like Ctrl-C: end the check, and print the results so far
    wanted = [
        name
        for name in CHECKS
        if name in arguments.checks or any(name in CHECKS[other][2] for other in arguments.checks)
    ]
    about = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "ranks": bench.ranks, "small": bench.small}
    interrupted = False
    try:
        for name in wanted:
            bench.results[name] = run_check(bench, name)
            print(check_line(name, bench.results[name]), file=sys.stderr, flush=True)
            (folder / "results.json").write_text(json.dumps(about | {"checks": bench.results}, indent=1))
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted", file=sys.stderr)
    print(json.dumps(about | {"interrupted": interrupted, "checks": bench.results}, indent=1))
    results = [check["result"] for check in bench.results.values()]
    print(", ".join(f"{results.count(result)} {result}" for result in dict.fromkeys(results)), file=sys.stderr)
    bad = {"fail", "broken"} | (set() if bench.small else {"none"})
    sys.exit(130 if interrupted else int(any(result in bad for result in results)))


def positive_int(text: str) -> int:
    """Return a positive integer of the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def positive_seconds(text: str) -> float:
    """Return a positive, finite number of the command line."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def run_check(bench: Bench, name: str) -> dict[str, Any]:
    """Run a check if it can start, and return its result. An exception becomes the result `broken`."""
    check, limit, needed = CHECKS[name]
    missing = [other for other in needed if bench.results.get(other, {}).get("result") not in ("pass", "fail", "ran")]
    started = time.monotonic()
    bench.limit, bench.log = min(limit, bench.deadline - started), bench.folder / f"{name}.log"
    bench.ends = started + bench.limit
    if name in GPU_ONLY and not bench.memory:
        return {"result": "none", "meaning": "needs a GPU"}
    if missing:
        return {"result": "none", "meaning": f"needs {' and '.join(missing)}"}
    if bench.limit < limit / 3:
        return {
            "result": "none",
            "meaning": f"needs {limit / 3:.0f} s, but only {max(0.0, bench.limit):.0f} s are left",
        }
    try:
        figures, passed, meaning = check(bench)
        result = {
            "result": "ran" if passed is None else "pass" if passed else "fail",
            "meaning": meaning,
            "figures": figures,
        }
    except Failed as error:
        result = {"result": "broken", "meaning": str(error)}
    except Exception as error:  # an unexpected error, such as output without figures
        result = {"result": "broken", "meaning": f"{type(error).__name__}: {error}"}
    return result | {"seconds": round(time.monotonic() - started, 1), "log": str(bench.log)}


def describe_machine() -> dict[str, Any]:
    """Return the GPUs and the versions of the packages that the checks depend on."""
    code = (
        "import json, torch; devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count())); "
        "gpus = [{'name': gpu.name, 'bytes': gpu.total_memory} for gpu in devices]; "
        "print(json.dumps({'gpus': gpus, 'cuda': torch.version.cuda}))"
    )
    results: dict[str, Any] = json.loads(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    )
    return results | {"python": platform.python_version(), **{name: version(name) for name in PINNED}}


def machine_lines(machine: dict[str, Any], bench: Bench) -> Iterator[str]:
    """Yield a line about the machine, and a line for each package version that differs from requirements.lock."""
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    yield f"{gpus}; {bench.ranks} rank{'s' * (bench.ranks > 1)}; logs in {bench.folder}"
    locked = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
    for name in PINNED:
        if machine[name].split("+")[0] != locked[name].split("+")[0]:
            yield f"note: the installed {name} is {machine[name]}; the project is tested with {locked[name]}"


def check_line(name: str, check: dict[str, Any]) -> str:
    """Return the line of a check: its result, its figures and their meaning."""
    figures = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in check.get("figures", {}).items()
        if isinstance(value, int | float | str)
    )
    return f"{check['result']:7} {name:13} {figures + ': ' if figures else ''}{check['meaning']}"


if __name__ == "__main__":
    main()
