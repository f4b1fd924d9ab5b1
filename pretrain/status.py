"""The status command: a table of runs with their state, progress, losses, speed, checkpoints and problems."""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from data_prep.utils.config_file import parse_yaml
from data_prep.utils.console import UserError, duration, exit_on_user_error, print_table
from pretrain.run_folder import PINS, list_steps, loss_terms, parse_metrics_line, read_evaluation_progress, read_status
from pretrain.sections import BUDGETS

TAIL_BYTES = 2**18
"""Number of bytes at the end of metrics.jsonl that are read."""
DEPTH = 3
"""Number of levels below a folder at which runs are found."""
SILENT_STEPS = 5
"""Multiple of the time between two lines of metrics.jsonl after which a running run counts as silent."""
SILENT_SECONDS = 60.0
"""Shortest silence that is reported, in seconds."""
HEADS = [
    *("run", "state", "step", "done", "left", "losses", "validation"),
    *("tokens/s", "checkpoint", "evaluations", "changed"),
]
"""Column headings of the table."""
CLEAR = "\033[H\033[2J\033[3J"
"""Control sequence that clears a terminal."""


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(
        description="Show the state of runs. A running run whose metrics have not changed for long is named as silent. "
        "An evaluation that is running is shown below the table."
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        default=[Path("runs")],
        metavar="RUN|FOLDER",
        help="run directories, or folders that contain them; default: runs",
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=5.0,
        metavar="SECONDS",
        help="repeat the table every SECONDS; default: 5",
    )
    arguments = parser.parse_intermixed_args()
    exit_on_user_error(lambda: _show(arguments.paths, arguments.watch))


def _show(paths: list[Path], interval: float | None) -> None:
    if interval is not None and interval <= 0:
        raise UserError(f"--watch is {interval:g} seconds; it must be above 0")
    while True:
        runs = list(dict.fromkeys(run for path in paths for run in find_runs(path)))
        if interval is not None and sys.stdout.isatty():
            print(CLEAR, end="")
        if not runs and interval is None:
            raise UserError(f"there is no run in {' or '.join(map(str, paths))}; name a run directory or its folder")
        table = [HEADS, *map(status_row, runs)]
        print_table(_without_empty_columns(table))
        for run in runs:
            if reason := read_status(run).get("reason"):
                print(f"{run.name}: {reason}", flush=True)
            if evaluation := read_evaluation_progress(run):
                print(f"{run.name}: {evaluation}", flush=True)
        if interval is None:
            return
        time.sleep(interval)


def find_runs(path: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Yield the run directories at or below a path, by name. Raises UserError if there is no such folder."""
    if not path.is_dir():
        raise UserError(f"there is no folder {path}; name a run directory or its folder")
    if (path / "config.yaml").is_file() and (path / "status.json").is_file():
        yield path
    elif depth:
        for folder in sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")):
            yield from find_runs(folder, depth - 1)


def status_row(run: Path) -> list[str]:
    """Return the cells of a run in the table, whose column headings are HEADS."""
    status, metrics = read_status(run), read_tail(run / "metrics.jsonl")
    last = metrics[-1] if metrics else {}
    files = [path for path in (run / "metrics.jsonl", run / "status.json") if path.exists()]
    age = time.time() - max(path.stat().st_mtime for path in files)
    state = str(status.get("status", "unknown"))
    if state == "running" and age > max(SILENT_SECONDS, SILENT_STEPS * _interval(metrics)):
        state = "silent"
    terms = loss_terms(metrics)
    fraction = _fraction(run, last)
    left = None
    if state == "running" and fraction and "seconds" in last:
        left = last["seconds"] * (1 - fraction) / fraction
    return [
        run.name,
        state,
        f"{last.get('step', status.get('step', 0)):,}",
        f"{fraction:.0%}" if fraction is not None else "",
        duration(left) if left is not None else "",
        _losses(metrics, terms, "loss/"),
        _losses(metrics, terms, "validation/loss/"),
        f"{speed:,.0f}" if (speed := _latest(metrics, "throughput/tokens_per_second")) is not None else "",
        f"{steps[-1]:,}" if (steps := list_steps(run / "checkpoints")) else "",
        _evaluations(run),
        f"{duration(age)} ago",
    ]


def read_tail(path: Path) -> list[dict[str, Any]]:
    """Return the last lines of a metrics.jsonl; empty if there are none."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    complete = lines[1:-1] if size > TAIL_BYTES else lines[:-1]
    return [values for line in complete if (values := parse_metrics_line(line)) is not None]


def _interval(metrics: list[dict[str, Any]]) -> float:
    """Return the longest training time between two of the last lines, in seconds; 0 if there are fewer than two."""
    times = [line["seconds"] for line in metrics if "seconds" in line]
    return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)


def _fraction(run: Path, last: dict[str, Any]) -> float | None:
    """Return the consumed fraction of the budget; None if it is unknown."""
    try:
        train = parse_yaml((run / "config.yaml").read_text(encoding="utf-8"))["train"]
        budget = next(key for key in BUDGETS if train.get(key) is not None)
        counter = {"steps": "step", "tokens": "tokens", "records": "records", "epochs": "epoch"}[budget]
        return min(1.0, last[counter] / train[budget])
    except (OSError, KeyError, TypeError, StopIteration, yaml.YAMLError):
        return None


def _latest(metrics: list[dict[str, Any]], tag: str) -> float | None:
    return next((line[tag] for line in reversed(metrics) if line.get(tag) is not None), None)


def _losses(metrics: list[dict[str, Any]], terms: list[str], prefix: str) -> str:
    values = {term: _latest(metrics, f"{prefix}{term}") for term in terms}
    return " ".join(f"{term} {value:.3f}" for term, value in values.items() if value is not None)


def _evaluations(run: Path) -> str:
    """Return the first metric at the last evaluated step, and the number of checkpoints that wait for an evaluation."""
    parts = []
    results = run / "evaluation" / "results.jsonl"
    if results.exists():
        lines = [line for line in results.read_text(encoding="utf-8", errors="replace").split("\n") if line]
        try:
            # an earlier checkpoint may have been evaluated again
            result = max(map(json.loads, lines), key=lambda result: result["step"])
            name, value = next(iter(result["metrics"].items()))
            parts.append(f"{result['task']}/{name} {value:.3f} at {result['step']:,}")
        except (ValueError, KeyError, StopIteration, TypeError):
            parts.append("unreadable")
    pins = run / "checkpoints" / PINS
    if waiting := len([path for path in pins.iterdir() if "." not in path.name]) if pins.exists() else 0:
        parts.append(f"{waiting} waiting")
    return ", ".join(parts)


def _without_empty_columns(table: list[list[str]]) -> list[list[str]]:
    kept = [column for column in range(len(HEADS)) if any(row[column] for row in table[1:])]
    return [[row[column] for column in kept] for row in table]
