"""Checkpoints: complete or absent, verified before they are loaded.

    checkpoints/step-00000100/    DeepSpeed's shards, random states, and manifest.json. The manifest has the size and
                                  SHA-256 of each file, the number of ranks, and the counters of the run
    checkpoints/latest            name of the newest valid checkpoint, for information only
    checkpoints/damaged-...       corrupt checkpoint, set aside with the reason in damage.txt and never loaded

A checkpoint is written to a hidden folder (saving.py) and renamed once every rank's files are on disk. A kill at any
time therefore leaves a complete checkpoint or none. DeepSpeed's shards are pickles, so they are loaded from run folders
only.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.utils.console import UserError
from data_prep.utils.files import sha256_file, sync_folder, write_text
from pretrain.planning.budget import Progress
from pretrain.run_folder import PINS, list_steps, step_name
from pretrain.training.distributed import World

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
"""File that DeepSpeed writes next to a converted checkpoint."""
DAMAGE_FILE = "damage.txt"
VISIBILITY_TIMEOUT = 30.0
"""Time within which a file written by one node must become visible on the main rank's node, in seconds."""


def publish(temporary: Path, step: int, ranks: int, state: dict[str, Any], files: dict[str, Any]) -> None:
    """Turn a hidden folder, whose files are on disk, into the checkpoint of a step.

    Raises OSError, for example if a file of another rank is not visible on this node.
    """
    folder, name = temporary.parent, step_name(step)
    _wait_for(temporary, files)
    write_text(
        temporary / MANIFEST,
        _with_checksum({"step": step, "ranks": ranks, "state": state, "files": dict(sorted(files.items()))}),
    )
    sync_folder(temporary)
    shutil.rmtree(folder / name, ignore_errors=True)
    os.replace(temporary, folder / name)
    sync_folder(folder)
    point_to(folder, step)


def point_to(folder: Path, step: int) -> None:
    """Make `latest` name the checkpoint of a step. Errors are ignored, because the file is for information only."""
    with contextlib.suppress(OSError):  # it is repaired when the run resumes
        write_text(folder / LATEST, step_name(step) + "\n")


def _wait_for(folder: Path, files: dict[str, Any]) -> None:
    """Wait until the files of all nodes are visible in `folder`. Raises FileNotFoundError after VISIBILITY_TIMEOUT.

    On a shared file system they may take a while to appear. If the folder is not shared, they never appear.
    """
    deadline = time.monotonic() + VISIBILITY_TIMEOUT
    while missing := [
        file
        for file, entry in files.items()
        if not (folder / file).exists() or (folder / file).stat().st_size != entry["bytes"]
    ]:
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                errno.ENOENT,
                f"{missing[0]} of another rank is not visible on this node: all nodes must share output_dir",
            )
        time.sleep(0.1)


def prune(
    folder: Path, keep: int, keep_every: int | None, is_stable: Callable[[Progress], bool] | None = None
) -> list[str]:
    """Remove old checkpoints; return the ones that could not be removed.

    The newest `keep` checkpoints, steps that are multiples of `keep_every`, pinned checkpoints, and the last checkpoint
    whose progress `is_stable` are kept. A checkpoint is first renamed to a hidden folder, so an interrupted removal
    leaves no incomplete checkpoint. If the checkpoint was pinned in the meantime, perhaps on another machine, it is
    renamed back.
    """
    failed = []
    pinned = _pins(folder)
    steps = list_steps(folder)
    last_stable = last_stable_step(folder, is_stable) if is_stable else None
    for old in steps[:-keep]:
        if (keep_every is None or old % keep_every) and step_name(old) not in pinned and old != last_stable:
            try:
                os.replace(folder / step_name(old), folder / f".{step_name(old)}.tmp")
                if step_name(old) in _pins(folder):
                    os.replace(folder / f".{step_name(old)}.tmp", folder / step_name(old))
            except OSError as error:
                failed.append(f"{step_name(old)} ({error.strerror})")
    return failed + remove_leftovers(folder)


def read_progress(checkpoint: Path) -> Progress | None:
    """Return the counters of a checkpoint; None if its manifest cannot be read."""
    try:
        return Progress(**json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["state"]["progress"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def last_stable_step(folder: Path, is_stable: Callable[[Progress], bool]) -> int | None:
    """Return the step of the last checkpoint whose progress `is_stable`; None if there is none."""
    for step in reversed(list_steps(folder)):
        progress = read_progress(folder / step_name(step))
        if progress is not None and is_stable(progress):
            return step
    return None


def remove_leftovers(folder: Path) -> list[str]:
    """Remove the hidden folders of interrupted saves and conversions; return the names that could not be removed."""
    (folder / LATEST_UNIVERSAL).unlink(missing_ok=True)
    leftovers = sorted(folder.glob(".step-*.tmp"))
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)
    return [leftover.name for leftover in leftovers if leftover.exists()]


def _pins(folder: Path) -> set[str]:
    """Return the names of checkpoints that wait for an evaluation, or for the first checkpoint of a branch.

    It lists the folder instead of checking for single files, because shared file systems do not answer a listing from a
    stale cache.
    """
    return {path.name.partition(".")[0] for path in (folder / PINS).iterdir()} if (folder / PINS).exists() else set()


def manifest_entry(path: Path) -> dict[str, Any]:
    """Flush a file to disk and return its entry in the manifest."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _with_checksum(manifest: dict[str, Any]) -> str:
    """Return the manifest as JSON text that contains its own checksum, `seal`."""
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest | {"seal": seal}, indent=2) + "\n"


def check(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return the problem of a checkpoint; None if it is valid.

    Only every `parts`-th file is read, starting with number `part`.
    """
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        del manifest["seal"]
        files = sorted(manifest["files"].items())
        if text != _with_checksum(manifest):
            return f"the content of {MANIFEST} has changed"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST} cannot be read"
    if not files:
        return f"{MANIFEST} lists no files"
    for file, entry in files[part::parts]:
        path = checkpoint / file
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{file} has {size} bytes instead of {entry['bytes']}"
            if sha256_file(path) != entry["sha256"]:
                return f"the content of {file} has changed"
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
    return None


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint that all ranks together have verified."""

    path: Path
    ranks: int
    """Number of ranks of the run that wrote the checkpoint."""
    state: dict[str, Any]
    folder: Path | None = None
    """Folder in which a converted copy is written; by default next to the checkpoint."""
    has_same_weights: bool = True
    """Whether the checkpoint has exactly the weights of the run. Otherwise it is converted and completed."""

    def needs_conversion(self, ranks: int) -> bool:
        """Return whether an engine on `ranks` ranks loads a converted copy."""
        return ranks != self.ranks or not self.has_same_weights

    def load_path_for(self, ranks: int) -> Path:
        """Return the folder that an engine on `ranks` ranks loads from."""
        if not self.needs_conversion(ranks):
            return self.path
        return (self.folder or self.path.parent) / f".{self.path.name}.universal.tmp"


def find_newest(folder: Path, world: World) -> VerifiedCheckpoint | None:
    """Return the newest valid checkpoint; None if there is none. All ranks must call this together.

    A corrupt checkpoint is set aside, and the previous one is used. Raises UserError if all are corrupt.
    """
    steps = world.gather_objects(list_steps(folder))[0]
    for step in reversed(steps):
        checkpoint = folder / step_name(step)
        found = verify(checkpoint, world)
        if isinstance(found, VerifiedCheckpoint):
            if world.is_main:
                _repair_latest(folder, checkpoint.name)
            return found
        logger.warning(
            f"the checkpoint {checkpoint} is corrupt: {found}; setting it aside as damaged-{checkpoint.name}"
        )
        if world.is_main:
            _set_aside(checkpoint, found)
        world.barrier()
    if steps or any(folder.glob("damaged-*")):
        raise UserError(
            f"every checkpoint in {folder} is corrupt; to start over, remove that folder or choose another `name`"
        )
    return None


def verify(checkpoint: Path, world: World) -> VerifiedCheckpoint | str:
    """Return a checkpoint if its files are valid, else its problem. All ranks must call this together."""
    problems = [found for found in world.gather_objects(check(checkpoint, world.rank, world.size)) if found]
    if problems:
        return str(problems[0])
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    return VerifiedCheckpoint(checkpoint, manifest["ranks"], manifest["state"])


def _set_aside(checkpoint: Path, problem: str) -> None:
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    with contextlib.suppress(OSError):  # the file is for information only
        write_text(aside / DAMAGE_FILE, problem + "\n")


def _repair_latest(folder: Path, name: str) -> None:
    try:
        previous = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        previous = ""
    if previous != name:
        problem = f"named {previous[:40]}" if previous else "was empty or missing"
        logger.info(f"note: {folder / LATEST} {problem}; the newest valid checkpoint is {name}")
        with contextlib.suppress(OSError):
            write_text(folder / LATEST, name + "\n")
