"""The run directory: names, and the status file. Light: imported by commands before they load anything heavy."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from data_prep.console import UserError, print_now
from data_prep.files import write_json

MODEL_DIR = "model"
"""Folder of the run's model configuration and tokenizer: an export without weights."""
REWIND_REASON_PREFIX = "rewinding"
"""How the reason of a run begins that has ended to go back to an earlier checkpoint."""
REWINDS = "rewinds.json"
"""Why and where to the run went back so far."""
PINS = "pins"
"""Folder of empty files named like checkpoints: each asks for an evaluation and keeps its checkpoint until then."""


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint or export."""
    return f"step-{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint or export in `folder`, ascending."""
    numbers = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(number) for number in numbers if number.isdigit())


def write_status(run_dir: Path, status: str, step: int, reason: str = "", can_restart: bool = True) -> None:
    """status.json: running, resumable, finished or failed; `again` is false where a start cannot go on before something is mended.

    Where it cannot be written, on a full disk, a line says so.
    """
    values = {"status": status, "step": step, "reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        write_json(run_dir / "status.json", values | ({} if can_restart else {"again": False}))
    except OSError as error:
        print_now(
            f"WARNING: cannot write {run_dir / 'status.json'} ({error.strerror}): the run is {status} at step {step}"
        )


def read_status(run_dir: Path) -> dict[str, Any]:
    """The last written status; empty where none is, or none that can be read."""
    try:
        return json.loads((run_dir / "status.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without a last one that is being written; warn of lines that cannot be read."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
    found = [parse_metrics_line(line) for line in lines]
    warn_about_corrupt_lines(path, [number for number, values in enumerate(found, 1) if values is None], "ignored")
    return [values for values in found if values is not None]


def parse_metrics_line(line: str) -> dict[str, Any] | None:
    """Return the values of a line of metrics.jsonl; None if it is damaged."""
    try:
        values = json.loads(line)
        return values if isinstance(values["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def warn_about_corrupt_lines(path: Path, numbers: list[int], what: str) -> None:
    """Print one warning on standard error if there are damaged lines, by their numbers. `what` says what became of them."""
    if numbers:
        print(
            f"WARNING: {path}: {len(numbers)} damaged lines are {what}, the first is line {numbers[0]}",
            file=sys.stderr,
            flush=True,
        )


def read_rewinds(run_dir: Path) -> list[dict[str, Any]]:
    """What the run went back for so far: step, score, the checkpoint `to`, and the steps `left_out`."""
    path = run_dir / REWINDS
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise UserError(
            f"{path} is corrupt ({error}): fix it, or remove it to train on the skipped steps too"
        ) from None
