"""The run directory: file names, status, metrics and rewinds.

Commands import this module before they load anything slow, so it imports nothing slow itself.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.utils.console import UserError
from data_prep.utils.files import is_locked, write_json

logger = logging.getLogger(__name__)

MODEL_DIR = "model"
"""Folder with the run's model configuration and tokenizer: an export without weights."""
NOT_TERMS = ("loss/total", "loss/spike_score")
"""Tags of metrics.jsonl that begin with `loss/` but are not a term of the objective."""
LAYERS = "layers/"
"""Beginning of the metric tags of layers, such as `layers/gradient_norm/3`. In metrics.jsonl, `layers/gradient_norm` is
an object with one entry for each part of the model."""
EMBEDDING = "embedding"
"""Part of the model with the token embeddings; its activations are the input of the first layer."""
REWIND_REASON_PREFIX = "rewinding"
"""Beginning of a status reason if the run ended to go back to an earlier checkpoint."""
REWINDS = "rewinds.json"
"""File with the rewinds of the run so far; see `read_rewinds`."""
PINS = "pins"
"""Folder of empty files named like checkpoints. A checkpoint that has one is kept until it has been evaluated.

A file with a further part of the name, after a dot, belongs to a branch that has no checkpoint yet.
"""

EVALUATION_LOCK, EVALUATION_PROGRESS = "evaluation/.lock", "evaluation/.progress"
"""Lock of the evaluations of a run, and a line about the one that holds it; see `read_evaluation_progress`."""
HUB = "hub"
"""Folder with the record of each export that has been pushed to the hub, and the log of the pushes.

A record has the name of the export, so `list_steps` lists the pushed steps.
"""


def read_evaluation_progress(run_dir: Path) -> str:
    """Return the line about the evaluation that is running; empty if there is none, or if it has been killed."""
    try:
        line = (run_dir / EVALUATION_PROGRESS).read_text(encoding="utf-8")
        return line if is_locked(run_dir / EVALUATION_LOCK) else ""
    except OSError:
        return ""


def step_name(step: int) -> str:
    """Return the folder name of a step's checkpoint or export."""
    return f"step-{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint or export in `folder`, ascending."""
    numbers = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(number) for number in numbers if number.isdigit())


def write_status(run_dir: Path, status: str, step: int, reason: str = "", can_restart: bool = True) -> None:
    """Write status.json: running, resumable, finished or failed.

    If `can_restart` is False, the key `again` of the file is false: a restart fails until the problem is fixed. If the
    file cannot be written, for example because the disk is full, log a warning.
    """
    values = {"status": status, "step": step, "reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        write_json(run_dir / "status.json", values | ({} if can_restart else {"again": False}))
    except OSError as error:
        logger.warning(f"cannot write {run_dir / 'status.json'} ({error.strerror}); the run is {status} at step {step}")


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return the content of status.json; empty if it is missing or cannot be read."""
    try:
        return json.loads((run_dir / "status.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without an incomplete last one; warn about lines that cannot be read."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
    parsed = [parse_metrics_line(line) for line in lines]
    warn_about_corrupt_lines(path, [number for number, values in enumerate(parsed, 1) if values is None], "ignored")
    return [values for values in parsed if values is not None]


def flat_values(line: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a line of metrics.jsonl by metric tag. In a line, the values of layers form objects."""
    flat: dict[str, Any] = {}
    for tag, value in line.items():
        flat |= {f"{tag}/{part}": entry for part, entry in value.items()} if isinstance(value, dict) else {tag: value}
    return flat


def loss_terms(metrics: Iterable[dict[str, Any]]) -> list[str]:
    """Return the terms of the loss that lines of metrics.jsonl have, in the order in which the objective lists them."""
    tags = dict.fromkeys(tag for line in metrics for tag in line)
    names = dict.fromkeys(tag.removeprefix("validation/") for tag in tags if tag not in NOT_TERMS)
    return [name.removeprefix("loss/") for name in names if name.startswith("loss/")]


def parse_metrics_line(line: str) -> dict[str, Any] | None:
    """Return the values of a line of metrics.jsonl; None if it is corrupt."""
    try:
        values = json.loads(line)
        return values if isinstance(values["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def warn_about_corrupt_lines(path: Path, numbers: list[int], treatment: str) -> None:
    """Log one warning if there are corrupt lines.

    `numbers` are their line numbers, and `treatment` is "ignored" or "removed".
    """
    if numbers:
        logger.warning(f"{path}: {len(numbers)} corrupt lines are {treatment}, the first is line {numbers[0]}")


def read_rewinds(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rewinds of the run so far: step, score, the checkpoint `to`, and the skipped steps `left_out`.

    The extension of a run is a rewind too, with the key `extended` and without a score or skipped steps. Raises
    UserError if the file is corrupt.
    """
    path = run_dir / REWINDS
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise UserError(
            f"{path} is corrupt ({error}): fix it, or remove it to train on the skipped steps too"
        ) from None


def remove_later_steps(run_dir: Path, step: int) -> None:
    """Remove the checkpoints and exports of steps after `step`, and the records of their pushes. Raises OSError."""
    checkpoints = run_dir / "checkpoints"
    for pushed in list_steps(run_dir / HUB):
        if pushed > step:  # the step is pushed again once it has been trained again
            (run_dir / HUB / step_name(pushed)).unlink(missing_ok=True)
    for folder in (checkpoints, run_dir / "export"):
        for saved in list_steps(folder):
            if saved > step:
                (folder / step_name(saved)).rename(folder / f".{step_name(saved)}.tmp")
                # saving the step again requests its evaluation again
                (checkpoints / PINS / step_name(saved)).unlink(missing_ok=True)
    for export in (run_dir / "export").glob(".*.tmp"):
        shutil.rmtree(export, ignore_errors=True)
