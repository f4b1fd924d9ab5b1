"""Checkpoints: complete or absent, verified before they are loaded.

    checkpoints/step-00000100/    DeepSpeed's shards, and manifest.json with the size and SHA-256 of each
    checkpoints/latest            the name of the newest good one
    checkpoints/damaged-...       set aside, never loaded

A checkpoint is written to a hidden folder and renamed once every rank's files are on disk, so whatever kills the
run leaves either all of it or nothing. DeepSpeed's shards are pickles: they are loaded from run folders only.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from data_prep.console import UserError
from data_prep.files import sha256_file, sync_folder, write_text
from pretrain.run_folder import PINS, list_steps, step_name
from pretrain.training.distributed import World

MANIFEST = "manifest.json"
LATEST = "latest"


def save(engine: deepspeed.DeepSpeedEngine, folder: Path, step: int, state: dict[str, Any], keep: int, world: World) -> None:
    """Save engine and `state` on all ranks together; remove all but the newest `keep`."""
    name = step_name(step)
    temporary = folder / f".{name}.tmp"
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    world.barrier()
    engine.save_checkpoint(str(folder), tag=temporary.name, client_state=state | {"rng": torch.get_rng_state()}, save_latest=False)
    world.barrier()
    files = sorted(path.name for path in temporary.iterdir())
    mine = {file: _describe(temporary / file) for file in files[world.rank :: world.size]}
    described = world.gather_objects(mine)
    if world.is_main:
        entries = {file: entry for part in described for file, entry in part.items()}
        write_text(temporary / MANIFEST, _sealed({"step": step, "ranks": world.size, "files": entries}))
        sync_folder(temporary)
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(temporary, folder / name)
        sync_folder(folder)
        write_text(folder / LATEST, name + "\n")
        _retain(folder, keep)
    world.barrier()


def _retain(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` and the pinned ones; a removal that is cut short leaves no visible checkpoint."""
    for old in list_steps(folder)[:-keep]:
        if not (folder / PINS / step_name(old)).exists():
            os.replace(folder / step_name(old), folder / f".{step_name(old)}.tmp")
    for hidden in folder.glob(".step-*.tmp"):
        shutil.rmtree(hidden, ignore_errors=True)


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _sealed(manifest: dict[str, Any]) -> str:
    """The manifest as text that carries its own checksum."""
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest | {"seal": seal}, indent=2) + "\n"


def check(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, None if nothing; looks at every `parts`-th file from `part` on."""
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        del manifest["seal"]
        files = sorted(manifest["files"].items())
        if text != _sealed(manifest):
            return f"the content of {MANIFEST} has changed"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST} is not readable"
    if not files:
        return f"{MANIFEST} lists no files"
    for file, entry in files[part::parts]:
        path = checkpoint / file
        if not path.exists():
            return f"{file} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{file} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if sha256_file(path) != entry["sha256"]:
            return f"the content of {file} has changed"
    return None


def load_newest(engine: deepspeed.DeepSpeedEngine, folder: Path, world: World, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Load the newest good checkpoint; return its `state`, None where there is no checkpoint.

    A damaged one is set aside, and the one before it is used. Raises UserError where all are damaged, or the
    checkpoint is of another number of ranks.
    """
    steps = list_steps(folder)
    for step in reversed(steps):
        checkpoint = folder / step_name(step)
        problems = [found for found in world.gather_objects(check(checkpoint, world.rank, world.size)) if found]
        if not problems:
            state = _load(engine, checkpoint, world)
            if world.is_main:
                write_text(folder / LATEST, checkpoint.name + "\n")
            return state
        say(f"WARNING: the checkpoint {checkpoint} is damaged: {problems[0]}; it is set aside as damaged-{checkpoint.name}")
        if world.is_main:
            shutil.rmtree(folder / f"damaged-{checkpoint.name}", ignore_errors=True)
            os.replace(checkpoint, folder / f"damaged-{checkpoint.name}")
        world.barrier()
    if steps or any(folder.glob("damaged-*")):
        raise UserError(f"every checkpoint in {folder} is damaged; to start over, remove that folder or choose another `name`")
    return None


def _load(engine: deepspeed.DeepSpeedEngine, checkpoint: Path, world: World) -> dict[str, Any]:
    ranks = json.loads((checkpoint / MANIFEST).read_text())["ranks"]
    if ranks != world.size:
        raise UserError(f"{checkpoint} was written by {ranks} ranks, this run has {world.size}: start it with {ranks}")
    path, state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    assert path is not None, f"DeepSpeed did not load {checkpoint}"
    torch.set_rng_state(state["rng"])
    return state


def consolidate(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole fp32 state of the LanguageModel in a checkpoint, on CPU, without an engine.

    Raises UserError where the checkpoint is missing or damaged.
    """
    problem = check(checkpoint) if checkpoint.exists() else "there is no such folder"
    if problem:
        raise UserError(f"cannot use the checkpoint {checkpoint}: {problem}")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    return {key.removeprefix("model."): value for key, value in state.items()}
