"""Twelve checks of the project on GPUs, in order of worth, within ten minutes on one: what is right, how fast, and how much memory.

    python benchmarks/gpu.py [--ranks 8] [--checks train head ...] [--seconds 600] [--work FOLDER] > gpu.json

Each check is a process of its own with a limit of time and a log in the work folder; one that fails does not end the others. A line of each goes to
stderr: whether it passed, its figures, and what they mean. One JSON object goes to stdout. Training runs use all GPUs (or --ranks of them), one rank
each. `--small` takes a tiny model, as a test of this command on CPU; its figures mean nothing.
"""

import argparse
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

import yaml

ROOT = Path(__file__).parent.parent
PINNED = ("torch", "deepspeed", "transformers")
LLAMA_1B = ROOT / "configs" / "models" / "llama_1b.yaml"
GEMMA = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256,
         "query_pre_attn_scalar": 256, "sliding_window": 1024}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "next_token": {"name": "next_token"},
    "joint": {"name": "llm_jepa", "distance": "info_nce", "weight": 0.1},
    "joint, half": {"name": "llm_jepa", "distance": "info_nce", "weight": 0.1, "dropout": 0.5},
    "independent": {"name": "llm_jepa", "distance": "info_nce", "weight": 0.1, "layout": "independent"},
    "tube": {"name": "semantic_tube", "weight": 0.02},
}
PROFILED_STEP = 7
BUSY = 0.85
"""Share of a step in which the GPU should compute."""
RESUMABLE = 75
"""Exit code of a run that a signal has stopped."""


class Failed(Exception):
    """A check that did not come to figures."""


@dataclass
class Bench:
    """Where the checks work, on how many ranks, and what they have found."""

    folder: Path
    ranks: int
    small: bool
    deadline: float
    log: Path = Path()
    limit: float = 0.0
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Positions of a row."""
        return 256 if self.small else 4096

    def write_config(self, name: str, **changes: Any) -> Path:
        """Write the configuration of a run: Llama 1B in bf16, or a tiny model, with changes of whole sections or, as section__key, of keys."""
        micro = 2 if self.small else 4
        steps = 4 if self.small else 10
        config: dict[str, Any] = {
            "name": name, "output_dir": str(self.folder / "runs"), "seed": 1,
            "data": {"path": str(self.folder / "data"), "views": ["context", "target"], "missing_views": "keep", "deduplicate": "none",
                     "validation_fraction": 0.05, "tokenizer": {"path": str(self.folder / "corpus")}, "sequence_length": self.length,
                     "sources": [{"type": "json", "path": str(self.folder / "corpus" / "records.jsonl")}]},
            "model": {"family": "llama", "shape": TINY if self.small else yaml.safe_load(LLAMA_1B.read_text())},
            "objective": OBJECTIVES["joint"],
            "train": {"steps": steps, "global_batch_rows": 4 * micro * self.ranks, "micro_batch_rows": micro, "learning_rate": 3e-4,
                      "warmup_fraction": 0.2, "precision": "bf16"},
            "checkpoint": {"every": 10**6, "keep": 1},
            "monitor": {"log_every": 1, "validate_every": 10**6, "validation_records": 40, "tensorboard": False},
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

    def call(self, command: list[str], expected: int = 0, stop_after: Callable[[], bool] | None = None) -> str:
        """Run a command within the limit of the check and return what it printed; with `stop_after`, end it by SIGTERM once that holds."""
        with open(self.log, "ab+") as log:
            begin = log.tell()
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment())
            ended_by = time.monotonic() + self.limit
            told = stop_after is None
            while process.poll() is None:
                if time.monotonic() > ended_by:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    raise Failed(f"not done within {self.limit:.0f} s")
                if not told and stop_after and stop_after():
                    process.send_signal(signal.SIGTERM)
                    told = True
                time.sleep(0.2)
            log.seek(begin)
            printed = log.read().decode(errors="replace")
        if process.returncode != expected:
            lines = [line.strip() for line in printed.splitlines() if line.strip()]
            error = next((line for line in reversed(lines) if "Error" in line or "error:" in line), lines[-1])
            raise Failed(f"exit code {process.returncode}: {error[:200]}")
        return printed

    def python(self, *words: Any) -> Any:
        """Run a script and return the JSON of its last line."""
        return json.loads(last_json(self.call([sys.executable, *map(str, words)])))

    def train(self, *configs: Path, profile: int | None = None) -> dict[str, Any]:
        """Train runs on all ranks one after another; return what benchmarks/gpu_runs.py finds, by name."""
        words = ["benchmarks/gpu_runs.py", *map(str, configs), *(["--profile", str(profile)] if profile else [])]
        launcher = [] if self.ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        found: dict[str, Any] = self.python(*launcher, *words)
        return found


def environment() -> dict[str, str]:
    """Return the environment of a check."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def last_json(printed: str) -> str:
    """Return the last line that is a JSON object."""
    return next(line for line in reversed(printed.splitlines()) if line.startswith("{"))


Result = tuple[dict[str, Any], bool, str]
"""Figures of a check, whether it passed, and what they mean."""


def check_corpus(bench: Bench) -> Result:
    """Prepare documents and pairs of 200 to 4,096 tokens in a vocabulary of 128,000 words."""
    records, words = (400, 1000) if bench.small else (6000, 128_000)
    bench.call([sys.executable, "benchmarks/gpu_corpus.py", str(bench.folder / "corpus"), "--records", str(records), "--words", str(words),
                "--longest", str(bench.length)])
    bench.call([sys.executable, "-m", "data_prep", str(bench.write_config("corpus"))])
    split = json.loads((bench.folder / "data" / "manifest.json").read_text())["splits"]["train"]
    return {"records": split["records"], "tokens": sum(split["tokens"].values())}, True, "what the runs train on"


def check_attention(bench: Bench) -> Result:
    """Compare FlexAttention with dense attention in fp32."""
    cases = bench.python("benchmarks/gpu_kernels.py", "attention")
    failed = [name for name, case in cases.items() if "error" in case]
    worst = max((max(case["error_of_output"], case["error_of_gradients"]) for case in cases.values() if "error" not in case), default=math.inf)
    figures = {"worst_error": worst, "failed": failed, "cases": cases}
    return figures, not failed and worst < 2e-2, "bf16 kernels are right where the error is below 0.02"


def check_train(bench: Bench) -> Result:
    """Train Llama 1B under ZeRO-3."""
    found = bench.train(bench.write_config("train"), profile=PROFILED_STEP)["train"]
    figures = run_figures(found)
    sound = figures["finite"] and figures["last_loss"] < figures["first_loss"] and not found["graphs_after_settling"]
    profile = found["profile"]
    figures |= {"graphs_after_settling": found["graphs_after_settling"], "profile": profile}
    return (figures | ({"busy_share": profile["busy_share"]} if profile else {}), sound and (not profile or profile["busy_share"] > BUSY),
            f"the loss falls, nothing compiles after step 2, and the GPU computes in {BUSY:.0%} of a step")


def check_head(bench: Bench) -> Result:
    """Time the output head by the size of its chunks."""
    sizes = bench.python("benchmarks/gpu_kernels.py", "head", *(["--small"] if bench.small else []))
    errors = [size["error_of_weight_gradient"] for size in sizes.values()]
    fastest = min(sizes, key=lambda name: sizes[name]["milliseconds"])
    return ({"fastest": fastest, **sizes[fastest], "sizes": sizes}, max(errors) < 5e-3 and max(errors) < 1.2 * min(errors),
            "the error of the weight gradient does not grow with the number of chunks")


def check_compiled(bench: Bench) -> Result:
    """Train Llama 1B under ZeRO stage 1 with compiled layers."""
    found = bench.train(bench.write_config("compiled", deepspeed={"zero_optimization": {"stage": 1}}, train__compile=not bench.small))["compiled"]
    figures = run_figures(found)
    before = bench.found.get("train", {}).get("figures", {}).get("tokens_per_second")
    ratio = figures["tokens_per_second"] / before if before else None
    return (figures | {"of_train": ratio}, figures["finite"] and (ratio is None or bench.small or ratio > 1),
            "compiling and stage 1 are faster than the run of `train`")


def check_objectives(bench: Bench) -> Result:
    """Compare each layout of the term with next-token training, on the same records."""
    paths = {name: bench.write_config(f"objective-{number}", objective=objective) for number, (name, objective) in enumerate(OBJECTIVES.items())}
    found = bench.train(*paths.values())
    figures: dict[str, Any] = {name: run_figures(found[path.stem]) for name, path in paths.items()}
    base = figures["next_token"]["records_per_second"]
    for each in figures.values():
        each["seconds_a_record_of_next_token"] = base / each["records_per_second"]
    ratios = {name: each["seconds_a_record_of_next_token"] for name, each in figures.items()}
    return ratios | {"runs": figures}, all(each["finite"] for each in figures.values()), "seconds a record, as multiples of next-token training"


def check_memory(bench: Bench) -> Result:
    """Compare the peak of twice as many rows with the estimate of --dry-run."""
    micro = 4 if bench.small else 8
    path = bench.write_config("memory", train__micro_batch_rows=micro, train__global_batch_rows=micro * bench.ranks, train__steps=3)
    estimate = bench.python("-c", ESTIMATE, path, bench.ranks)["bytes"]
    peak = bench.train(path)["memory"].get("peak_bytes")
    share = None if peak is None else peak / estimate
    return {"estimate_bytes": estimate, "peak_bytes": peak, "peak_of_estimate": share}, share is None or share < 1.1, "at most 10% above the estimate"


ESTIMATE = """
import json, sys
from pretrain.config import load_config
from pretrain.training.dry_run import beside_states, checked_plan, states_of_rank
plan = checked_plan(load_config(sys.argv[1]), int(sys.argv[2]))
states = states_of_rank(plan, int(plan.zero.stage), int(sys.argv[2]))
beside = sum(whole for _, whole, _ in beside_states(plan, "cuda"))
print(json.dumps({"bytes": max(states.held + beside, states.in_step)}))
"""


def check_pieces(bench: Bench) -> Result:
    """Time the optimizer's step, the copy of a checkpoint and the monitors."""
    figures = bench.python("benchmarks/gpu_kernels.py", "pieces", *(["--small"] if bench.small else []))
    faster = figures["adamw_foreach_milliseconds"] / figures["adamw_fused_milliseconds"]
    slowest = max(value for name, value in figures.items() if name.startswith("monitors"))
    return ({"fused_adamw_is_faster_by": faster, **figures}, bench.small or (faster > 1.5 and slowest < 0.5),
            "fused AdamW is at least 1.5 times as fast, and the monitors take less than half a second")


def check_stop(bench: Bench) -> Result:
    """Send SIGTERM to a run, which saves and ends with code 75."""
    path = bench.write_config("stop", train__steps=10**5, checkpoint__every=5, model__shape=TINY, monitor__log_every=1)
    metrics = bench.folder / "runs" / "stop" / "metrics.jsonl"
    bench.call(training_command(bench, path), expected=RESUMABLE, stop_after=lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 6)
    return {"steps": len(metrics.read_text().splitlines())}, True, "a signal leaves a checkpoint of the very step"


def check_resume(bench: Bench) -> Result:
    """Start the same run again, which goes on where it stopped, and its loss with it."""
    path, metrics = bench.folder / "stop.yaml", bench.folder / "runs" / "stop" / "metrics.jsonl"
    before = [json.loads(line) for line in metrics.read_text().splitlines()]
    wanted = len(before) + 6
    bench.call(training_command(bench, path), expected=RESUMABLE, stop_after=lambda: len(metrics.read_text().splitlines()) > wanted)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    jump = lines[len(before)]["loss/lm"] - before[-1]["loss/lm"]
    steps = [line["step"] for line in lines]
    sound = steps == list(range(1, len(steps) + 1)) and abs(jump) < 0.5
    return {"jump_of_the_loss": jump}, sound, "no step is lost or done twice, and the loss does not jump"


def check_gemma2(bench: Bench) -> Result:
    """Train Gemma 2, with soft-capping and a sliding window, and validate it."""
    shape = TINY | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64} if bench.small else GEMMA
    path = bench.write_config("gemma2", model={"family": "gemma2", "shape": shape}, train__steps=3, monitor__validate_every=1)
    figures = run_figures(bench.train(path)["gemma2"])
    return figures, figures["finite"], "the losses are finite"


def check_accumulation(bench: Bench) -> Result:
    """Compare the gradient norms of a first step of 64 micro steps, with sums in bf16 and in fp32."""
    shape = TINY if bench.small else yaml.safe_load(LLAMA_1B.read_text()) | {"num_hidden_layers": 4}
    paths = [bench.write_config(f"accumulated-{dtype}", model__shape=shape, train__steps=1, train__micro_batch_rows=1,
                                train__global_batch_rows=64 * bench.ranks, deepspeed={"data_types": {"grad_accum_dtype": dtype}})
             for dtype in ("fp32", "bf16")]
    found = bench.train(*paths)
    fp32, bf16 = (found[path.stem]["metrics"][0]["optimizer/grad_norm"] for path in paths)
    return {"fp32": fp32, "bf16": bf16, "difference": bf16 / fp32 - 1}, abs(bf16 / fp32 - 1) < 0.05, "what summing in bf16 would have cost"


def run_figures(found: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a run: losses, and the median speed of the steps after the first two."""
    lines = found["metrics"]
    settled = [line for line in lines[2:] if "throughput/tokens_per_second" in line] or lines[-1:]

    def median(tag: str) -> float | None:
        values = sorted(line[tag] for line in settled if tag in line)
        return values[len(values) // 2] if values else None

    losses = [line["loss/lm"] for line in lines]
    return {"first_loss": losses[0], "last_loss": losses[-1], "finite": all(map(math.isfinite, losses)),
            "tokens_per_second": median("throughput/tokens_per_second"), "records_per_second": median("throughput/records_per_second"),
            "mfu": median("throughput/mfu"), "peak_gib": found["peak_bytes"] / 2**30 if "peak_bytes" in found else None}


def training_command(bench: Bench, path: Path) -> list[str]:
    """Return the command of a run as a user starts it."""
    launcher = [] if bench.ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={bench.ranks}"]
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
"""By name, in order of worth: the check, its limit in seconds, and the checks that it needs."""
ON_GPU_ALONE = {"attention"}


def main() -> None:
    """Run the checks and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, help="GPUs to train on; default: all")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="NAME", help=", ".join(CHECKS))
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no check starts, and those that run end")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu", help="folder of logs and runs")
    parser.add_argument("--small", action="store_true", help="a tiny model, also on CPU: a test of this command")
    arguments = parser.parse_args()
    machine = describe_machine()
    if not machine["gpus"] and not arguments.small:
        parser.error("torch sees no GPU here; --small tries this command with a tiny model")
    folder = arguments.work.absolute() / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    bench = Bench(folder, arguments.ranks or max(1, len(machine["gpus"])), arguments.small, time.monotonic() + arguments.seconds)
    for line in machine_lines(machine, bench):
        print(line, file=sys.stderr, flush=True)
    wanted = [name for name in CHECKS if name in arguments.checks or any(name in CHECKS[other][2] for other in arguments.checks)]
    for name in wanted:
        bench.found[name] = run_check(bench, name, bool(machine["gpus"]))
        print(check_line(name, bench.found[name]), file=sys.stderr, flush=True)
    about = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "ranks": bench.ranks, "small": bench.small}
    print(json.dumps(about | {"checks": bench.found}, indent=1))
    sys.exit(any(check["result"] == "fail" for check in bench.found.values()))


def run_check(bench: Bench, name: str, on_gpu: bool) -> dict[str, Any]:
    """Run a check unless it cannot; whatever it raises is its result."""
    check, limit, needed = CHECKS[name]
    missing = [other for other in needed if bench.found.get(other, {}).get("result") not in ("pass", "fail")]
    bench.limit, bench.log = min(limit, bench.deadline - time.monotonic()), bench.folder / f"{name}.log"
    if name in ON_GPU_ALONE and not on_gpu:
        return {"result": "none", "meaning": "needs a GPU"}
    if missing:
        return {"result": "none", "meaning": f"needs {' and '.join(missing)}"}
    if bench.limit < limit / 3:
        return {"result": "none", "meaning": "no time is left"}
    started = time.monotonic()
    try:
        figures, passed, meaning = check(bench)
        result = {"result": "pass" if passed else "fail", "meaning": meaning, "figures": figures}
    except Failed as error:
        result = {"result": "broken", "meaning": str(error)}
    except Exception as error:  # what a check did not foresee, such as output without figures
        result = {"result": "broken", "meaning": f"{type(error).__name__}: {error}"}
    return result | {"seconds": round(time.monotonic() - started, 1), "log": str(bench.log)}


def describe_machine() -> dict[str, Any]:
    """Return the GPUs and the versions of what the checks depend on."""
    code = ("import torch, json; print(json.dumps({'gpus': [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())], "
            "'cuda': torch.version.cuda}))")
    found: dict[str, Any] = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    return found | {"python": platform.python_version(), **{name: version(name) for name in PINNED}}


def machine_lines(machine: dict[str, Any], bench: Bench) -> Iterator[str]:
    """Yield what is tested where, and which versions are not those of the project."""
    yield f"{', '.join(machine['gpus']) or 'no GPU'}; {bench.ranks} rank{'s' * (bench.ranks > 1)}; logs in {bench.folder}"
    locked = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
    for name in PINNED:
        if machine[name].split("+")[0] != locked[name].split("+")[0]:
            yield f"note: {name} is {machine[name]} here; the project is tested with {locked[name]}"


def check_line(name: str, check: dict[str, Any]) -> str:
    """Return the line of a check: its result, its figures, and what they mean."""
    figures = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in check.get("figures", {}).items()
                        if isinstance(value, int | float | str))
    return f"{check['result']:7} {name:13} {figures + ': ' if figures else ''}{check['meaning']}"


if __name__ == "__main__":
    main()
