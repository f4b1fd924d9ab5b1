"""Comparison of objectives on NL-RX-SYNTH: LM loss, exact match, and how well embeddings separate records.

    python benchmarks/arms.py --train train.jsonl --test test.jsonl [--jobs 2] [--seeds 1 2 3] [--arms NAME ...]

Every arm is a run of --config (configs/nlrx_synth.yaml). All arms train 4 epochs on the same records, with windows in
the same order, in one process and one thread. Each run appends a line to the file --results. A run whose line
exists is skipped, so the command can be stopped and started again. The table is printed at the end. With several
--learning-rates, it shows for each arm the rate with the lowest validation LM loss.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).parent.parent
RETRIEVAL_ROWS = 1000
PAIR_ROWS, PLAIN_ROWS = 12, 8
"""Rows per step: about 70 records, with and without copies of the targets."""
ARMS = {
    "next_token": "{name: next_token}",
    "cosine": "{name: llm_jepa, weight: 0.5}",
    "l2": "{name: llm_jepa, distance: l2, weight: 0.05}",
    "info_nce": "{name: llm_jepa, distance: info_nce, weight: 0.1}",
    "cosine + vicreg": "{name: llm_jepa, weight: 0.5, regularizers: [{name: vicreg, weight: 0.1}]}",
    "cosine + sigreg": "{name: llm_jepa, weight: 0.5, regularizers: [{name: sigreg, weight: 0.02}]}",
    "semantic_tube": "{name: semantic_tube, weight: 0.02}",
    "cosine + coding rate": "{name: llm_jepa, weight: 0.5, regularizers: [{name: coding_rate, weight: 0.5}]}",
    "in context": "{name: llm_jepa, target: in_context, weight: 0.5}",
    "in context + coding rate": "{name: llm_jepa, target: in_context, weight: 0.5, "
    "regularizers: [{name: coding_rate, weight: 0.5}]}",
    "in context, k = 0, + coding rate": "{name: llm_jepa, target: in_context, predictor_tokens: 0, weight: 0.5, "
    "regularizers: [{name: coding_rate, weight: 0.5}]}",
    "in context, MLP, stop-gradient": "{name: llm_jepa, target: in_context, weight: 0.5, predictor_mlp: 384, "
    "stop_gradient: true}",
    "in context + coding rate, first quarter": "{name: llm_jepa, target: in_context, weight: 0.5, active: [0, 0.25], "
    "regularizers: [{name: coding_rate, weight: 0.5}]}",
    "nitp": "{name: nitp}",
    "nextlat": "{name: nextlat}",
    "nextlat + KL": "{name: nextlat, kl_weight: 0.5}",
    "coding rate alone": "{name: regularized, regularizers: [{name: coding_rate, weight: 0.5}]}",
}
COLUMNS = {
    "LM loss": "lm",
    "exact": "exact",
    "paired cosine": "paired_cosine",
    "shuffled": "shuffled_cosine",
    "retrieval@1": "retrieval_at_1",
    "effective rank": "effective_rank",
    "retrieval@1 in context": "in_context_retrieval_at_1",
    "rank in context": "in_context_effective_rank",
}


def main() -> None:
    """Parse the command line, run the arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="JSON lines with the training rows of NL-RX-SYNTH")
    parser.add_argument("--test", required=True, help="JSON lines with the test rows of NL-RX-SYNTH")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "nlrx_synth.yaml")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rates", type=float, nargs="+", help="default: the rate of the configuration")
    parser.add_argument("--work", default="runs/arms", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "arms.jsonl")
    parser.add_argument("--jobs", type=int, default=2, help="number of runs at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), metavar="NAME", help="names of arms, or objectives as YAML"
    )
    arguments = parser.parse_args()
    data = [f"data.path={arguments.work}/data", f"data.sources.0.path={arguments.train}"]
    run_command("-m", "data_prep", arguments.config, *data)
    lock = Lock()
    finished = finished_runs(arguments.results)
    pending_runs = [
        (arm, seed, rate)
        for seed in arguments.seeds
        for rate in arguments.learning_rates or [None]
        for arm in arguments.arms
        if (arm, seed, rate) not in finished
    ]
    executor = ThreadPoolExecutor(arguments.jobs)
    try:
        for result in [executor.submit(run, *pending, arguments, data, lock) for pending in pending_runs]:
            result.result()
    finally:
        executor.shutdown(cancel_futures=True)
    print(table(read_json_lines(arguments.results)))


def run(arm: str, seed: int, rate: float | None, arguments: argparse.Namespace, data: list[str], lock: Lock) -> None:
    """Train and evaluate one arm with one seed and learning rate, and append a line to the results."""
    objective = ARMS.get(arm, arm)
    has_copies = "in_context" not in objective and "regularized" not in objective
    rows = PAIR_ROWS if has_copies and ("llm_jepa" in objective or "regularizers" in objective) else PLAIN_ROWS
    title = f"{arm}-{seed}" + (f"-{rate}" if rate else "")
    name = "".join(letter if letter.isalnum() else "-" for letter in title).strip("-")
    folder = Path(arguments.work) / name
    run_command(
        "launcher/run.py",
        arguments.config,
        *data,
        *([f"train.learning_rate={rate}"] if rate else []),
        f"name={name}",
        f"output_dir={arguments.work}",
        f"seed={seed}",
        f"objective={objective}",
        f"train.epochs={arguments.epochs}",
        f"train.global_batch_rows={rows}",
        f"train.micro_batch_rows={rows}",
        "checkpoint.every=1000000",
        "evaluation.tasks=[]",
        "monitor.loggers=[]",
    )
    run_command("launcher/evaluate.py", folder, "--task", "nl_rx", f"task.test={arguments.test}")
    run_command(
        "launcher/evaluate.py", folder, "--task", "loss", f"task.test={arguments.test}", f"task.rows={RETRIEVAL_ROWS}"
    )
    evaluated = {line["task"]: line["metrics"] for line in read_json_lines(folder / "evaluation" / "results.jsonl")}
    last = read_json_lines(folder / "metrics.jsonl")[-1]
    line = {
        "arm": arm,
        "objective": objective,
        "seed": seed,
        "steps": last["step"],
        **({"learning_rate": rate, "validation_lm": last["validation/loss/lm"]} if rate else {}),
        "records": last["records"],
        "positions": last["positions"],
        "seconds": round(last["seconds"]),
    }
    with lock, open(arguments.results, "a", encoding="utf-8") as results:
        results.write(json.dumps(line | evaluated["loss"] | evaluated["nl_rx"]) + "\n")
    print(
        f"{title}: exact {evaluated['nl_rx']['exact']:.4f}, retrieval@1 {evaluated['loss']['retrieval_at_1']:.3f}",
        flush=True,
    )


def run_command(*command: object) -> None:
    """Run a command of the project on one thread; if the command fails, exit with the end of its output."""
    completed = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if completed.returncode:
        sys.exit(
            f"{' '.join(map(str, command))} failed with exit code {completed.returncode}:\n{completed.stdout[-4000:]}"
        )


def read_json_lines(path: Path) -> list[dict]:
    """Return the objects of a JSON lines file; empty if the file does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def finished_runs(results: Path) -> set[tuple[str, int, float | None]]:
    """Return the arms, seeds and learning rates that already have a line in the results."""
    return {(line["arm"], line["seed"], line.get("learning_rate")) for line in read_json_lines(results)}


def with_best_rate(lines: list[dict]) -> list[dict]:
    """Return the lines of the learning rate with the lowest mean validation LM loss, or all lines without a rate."""
    by_rate: dict[float | None, list[dict]] = {}
    for line in lines:
        by_rate.setdefault(line.get("learning_rate"), []).append(line)
    if len(by_rate) == 1:
        return lines
    return min(by_rate.values(), key=lambda group: statistics.fmean(line["validation_lm"] for line in group))


def table(lines: list[dict]) -> str:
    """Return a Markdown table of the mean and standard deviation over seeds."""
    rows = ["| objective | seeds | learning rate | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (3 + len(COLUMNS))]
    for arm in dict.fromkeys([*ARMS, *(line["arm"] for line in lines)]):
        arm_lines = [line for line in lines if line["arm"] == arm]
        if not arm_lines:
            continue
        arm_lines = with_best_rate(arm_lines)
        rows.append(
            f"| {arm} | {len(arm_lines)} | {arm_lines[0].get('learning_rate', '')} | "
            + " | ".join(format_spread([line[key] for line in arm_lines if key in line]) for key in COLUMNS.values())
            + " |"
        )
    return "\n".join(rows)


def format_spread(values: list[float]) -> str:
    """Return a mean and, if there are several values, their standard deviation as text."""
    if not values:
        return ""
    digits = 1 if max(values) >= 10 else 3
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
