"""Checkpoints: complete or absent, verified before they are loaded.

    checkpoints/step-00000100/    DeepSpeed's shards, random states, and manifest.json with the size and SHA-256 of each, ranks and counters
    checkpoints/latest            the name of the newest good one, for people; the folders themselves decide
    checkpoints/damaged-...       set aside with the reason in damage.txt, never loaded

A checkpoint is written to a hidden folder (saving.py) and renamed once every rank's files are on disk, so whatever kills the
run leaves either all of it or nothing. DeepSpeed's shards are pickles: they are loaded from run folders only.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from data_prep.console import UserError
from data_prep.files import sha256_file, sync_folder, write_text
from pretrain.run_folder import PINS, list_steps, step_name
from pretrain.training.distributed import World
from pretrain.training.random_state import restore_random_state

MANIFEST = "manifest.json"
LATEST = "latest"
REASON = "damage.txt"
SHOWN = 30.0
"""Seconds in which a file that one node has written must show on another."""


def publish(temporary: Path, step: int, ranks: int, state: dict[str, Any], files: dict[str, Any]) -> None:
    """Declare the files of a hidden folder, which are on disk, the checkpoint of a step. Raises OSError, also where they are not all here."""
    folder, name = temporary.parent, step_name(step)
    _wait_for(temporary, files)
    write_text(temporary / MANIFEST, _sealed({"step": step, "ranks": ranks, "state": state, "files": dict(sorted(files.items()))}))
    sync_folder(temporary)
    shutil.rmtree(folder / name, ignore_errors=True)
    os.replace(temporary, folder / name)
    sync_folder(folder)
    with contextlib.suppress(OSError):  # the next start mends it
        write_text(folder / LATEST, name + "\n")


def _wait_for(folder: Path, files: dict[str, Any]) -> None:
    """Other nodes' files may take a while to show on a shared file system; where the folder is not shared they never do."""
    deadline = time.monotonic() + SHOWN
    while missing := [file for file, entry in files.items() if not (folder / file).exists() or (folder / file).stat().st_size != entry["bytes"]]:
        if time.monotonic() > deadline:
            raise FileNotFoundError(errno.ENOENT, f"{missing[0]} of another rank does not show here: all nodes must share output_dir")
        time.sleep(0.1)


def retain(folder: Path, keep: int, keep_every: int | None) -> list[str]:
    """Remove all but the newest `keep`, those of multiples of `keep_every` and the pinned ones; return what could not be removed.

    A removal that is cut short leaves no visible checkpoint. One that is pinned, perhaps from another machine, while it is moved away comes back.
    """
    failed = []
    pinned = _pins(folder)
    for old in list_steps(folder)[:-keep]:
        if (keep_every is None or old % keep_every) and step_name(old) not in pinned:
            try:
                os.replace(folder / step_name(old), folder / f".{step_name(old)}.tmp")
                if step_name(old) in _pins(folder):
                    os.replace(folder / f".{step_name(old)}.tmp", folder / step_name(old))
            except OSError as error:
                failed.append(f"{step_name(old)} ({error.strerror})")
    for hidden in folder.glob(".step-*.tmp"):
        shutil.rmtree(hidden, ignore_errors=True)
        if hidden.exists():
            failed.append(hidden.name)
    return failed


def _pins(folder: Path) -> set[str]:
    """Checkpoints that wait for an evaluation. Read from the folder, which file systems of several machines do not answer from a cache."""
    return {path.name for path in (folder / PINS).iterdir()} if (folder / PINS).exists() else set()


def described(path: Path) -> dict[str, Any]:
    """The entry of a file in the manifest; the file is on disk then."""
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
class Found:
    """A checkpoint that every rank has found whole."""

    path: Path
    ranks: int
    """Of the run that wrote it."""
    state: dict[str, Any]

    def shards_for(self, ranks: int) -> Path:
        """The folder that an engine on so many ranks loads from."""
        return self.path if ranks == self.ranks else self.path.with_name(f".{self.path.name}.universal.tmp")


def find_newest(folder: Path, world: World, say: Callable[[str], None]) -> Found | None:
    """The newest good checkpoint; None where there is none. On all ranks together.

    A damaged one is set aside, and the one before it is used. Raises UserError where all are damaged.
    """
    steps = world.gather_objects(list_steps(folder))[0]
    for step in reversed(steps):
        checkpoint = folder / step_name(step)
        problems = [found for found in world.gather_objects(check(checkpoint, world.rank, world.size)) if found]
        if not problems:
            if world.is_main:
                _repair_latest(folder, checkpoint.name, say)
            manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
            return Found(checkpoint, manifest["ranks"], manifest["state"])
        say(f"WARNING: the checkpoint {checkpoint} is damaged: {problems[0]}; it is set aside as damaged-{checkpoint.name}")
        if world.is_main:
            _set_aside(checkpoint, problems[0])
        world.barrier()
    if steps or any(folder.glob("damaged-*")):
        raise UserError(f"every checkpoint in {folder} is damaged; to start over, remove that folder or choose another `name`")
    return None


def _set_aside(checkpoint: Path, problem: str) -> None:
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    with contextlib.suppress(OSError):  # a note for people
        write_text(aside / REASON, problem + "\n")


def _repair_latest(folder: Path, name: str, say: Callable[[str], None]) -> None:
    try:
        named = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        named = ""
    if named != name:
        say(f"note: {folder / LATEST} {f'named {named[:40]}' if named else 'was empty or missing'}; the newest good checkpoint is {name}")
        with contextlib.suppress(OSError):
            write_text(folder / LATEST, name + "\n")


def make_universal(found: Found, world: World, say: Callable[[str], None]) -> None:
    """Bring a checkpoint of another number of ranks into DeepSpeed's universal format, beside it, on rank 0. Raises UserError."""
    target = found.shards_for(world.size)
    if target == found.path:
        return
    say(f"{found.path} was written by {found.ranks} rank{'s' * (found.ranks > 1)}, this run has {world.size}: converting it")
    world.agree(lambda: _convert(found.path, target) if world.is_main else None)


def _convert(checkpoint: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(checkpoint), "--output_folder", str(target),
               "--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]  # which DeepSpeed wants of stages 1 and 2
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(target, ignore_errors=True)
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit code {done.returncode}")
        raise UserError(f"{checkpoint} cannot be converted for another number of ranks ({last.strip()[:200]}); start with as many ranks as wrote "
                        "it, or, where the disk is full, make room")


def load(engine: deepspeed.DeepSpeedEngine, found: Found, world: World) -> None:
    """Load a checkpoint that was found good, and converted where it had to be, into an engine on all ranks."""
    shards = found.shards_for(world.size)
    optimizer = engine.optimizer.optimizer
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    path, _ = engine.load_checkpoint(str(shards.parent), tag=shards.name)
    assert path is not None, f"DeepSpeed did not load {shards}"
    if shards != found.path:
        # DeepSpeed 0.19.8 gives all groups the weight decay of the first, and all of them one counter of steps, which each then advances
        for group, setting in zip(optimizer.param_groups, settings, strict=True):
            group |= setting
        for state in optimizer.state.values():
            state["step"] = state["step"].clone()
    restore_random_state(found.path, world.rank)
    world.barrier()
    if world.is_main and shards != found.path:
        shutil.rmtree(shards, ignore_errors=True)
        (shards.parent / "latest_universal").unlink(missing_ok=True)  # which DeepSpeed writes there


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
