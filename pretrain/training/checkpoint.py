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
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
from pretrain.training.evaluation_requests import die_with_parent
from pretrain.training.random_state import restore_random_state
from pretrain.training.stop import Stopped, StopRequest

MANIFEST = "manifest.json"
LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
"""File that DeepSpeed writes beside a converted checkpoint."""
REASON = "damage.txt"
SAFE = re.compile(r"[\w/.-]*", re.ASCII)
"""Paths that mean nothing else as a pattern."""
WHOLE_MODULE = "mp_rank_00_model_states.pt"
"""File of a checkpoint with the weights that the model computes with, if they are not partitioned."""
CONVERTER = ["-m", "deepspeed.checkpoint.ds_to_universal"]
"""Python arguments that start the conversion to another number of ranks."""
CONVERSION_POLL = 0.2
"""Time between two looks for a signal during a conversion, in seconds."""
VISIBILITY_TIMEOUT = 30.0
"""Seconds in which a file that one node has written must show on another."""


def publish(temporary: Path, step: int, ranks: int, state: dict[str, Any], files: dict[str, Any]) -> None:
    """Declare the files of a hidden folder, which are on disk, the checkpoint of a step. Raises OSError, also where they are not all here."""
    folder, name = temporary.parent, step_name(step)
    _wait_for(temporary, files)
    write_text(
        temporary / MANIFEST,
        _sealed({"step": step, "ranks": ranks, "state": state, "files": dict(sorted(files.items()))}),
    )
    sync_folder(temporary)
    shutil.rmtree(folder / name, ignore_errors=True)
    os.replace(temporary, folder / name)
    sync_folder(folder)
    with contextlib.suppress(OSError):  # the next start mends it
        write_text(folder / LATEST, name + "\n")


def _wait_for(folder: Path, files: dict[str, Any]) -> None:
    """Other nodes' files may take a while to show on a shared file system; where the folder is not shared they never do."""
    deadline = time.monotonic() + VISIBILITY_TIMEOUT
    while missing := [
        file
        for file, entry in files.items()
        if not (folder / file).exists() or (folder / file).stat().st_size != entry["bytes"]
    ]:
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                errno.ENOENT, f"{missing[0]} of another rank does not show here: all nodes must share output_dir"
            )
        time.sleep(0.1)


def prune(folder: Path, keep: int, keep_every: int | None) -> list[str]:
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
    return failed + remove_leftovers(folder)


def remove_leftovers(folder: Path) -> list[str]:
    """Remove the hidden folders of interrupted saves and conversions. Return the names of those that cannot be removed."""
    (folder / LATEST_UNIVERSAL).unlink(missing_ok=True)
    leftovers = sorted(folder.glob(".step-*.tmp"))
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)
    return [leftover.name for leftover in leftovers if leftover.exists()]


def _pins(folder: Path) -> set[str]:
    """Checkpoints that wait for an evaluation. Read from the folder, which file systems of several machines do not answer from a cache."""
    return {path.name for path in (folder / PINS).iterdir()} if (folder / PINS).exists() else set()


def manifest_entry(path: Path) -> dict[str, Any]:
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
class VerifiedCheckpoint:
    """A checkpoint that every rank has found whole."""

    path: Path
    ranks: int
    """Of the run that wrote it."""
    state: dict[str, Any]

    def load_path_for(self, ranks: int) -> Path:
        """The folder that an engine on so many ranks loads from."""
        return self.path if ranks == self.ranks else self.path.with_name(f".{self.path.name}.universal.tmp")


def find_newest(folder: Path, world: World, say: Callable[[str], None]) -> VerifiedCheckpoint | None:
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
            return VerifiedCheckpoint(checkpoint, manifest["ranks"], manifest["state"])
        say(
            f"WARNING: the checkpoint {checkpoint} is damaged: {problems[0]}; it is set aside as damaged-{checkpoint.name}"
        )
        if world.is_main:
            _set_aside(checkpoint, problems[0])
        world.barrier()
    if steps or any(folder.glob("damaged-*")):
        raise UserError(
            f"every checkpoint in {folder} is damaged; to start over, remove that folder or choose another `name`"
        )
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
        say(
            f"note: {folder / LATEST} {f'named {named[:40]}' if named else 'was empty or missing'}; the newest good checkpoint is {name}"
        )
        with contextlib.suppress(OSError):
            write_text(folder / LATEST, name + "\n")


def make_universal(
    found: VerifiedCheckpoint, world: World, stop: StopRequest, say: Callable[[str], None], round_robin: bool = False
) -> None:
    """Convert a checkpoint of another number of ranks to DeepSpeed's universal format, next to it, on the main rank.

    Raises UserError, also for one of `round_robin` gradients, and Stopped if a signal ends the conversion.
    """
    target = found.load_path_for(world.size)
    if target == found.path:
        return
    if round_robin:
        raise UserError(
            f"{found.path} was written by {found.ranks} rank{'s' * (found.ranks > 1)} with "
            "deepspeed.zero_optimization.round_robin_gradients, and DeepSpeed cannot load that on another number of ranks: start with "
            f"{found.ranks}"
        )
    say(
        f"{found.path} was written by {found.ranks} rank{'s' * (found.ranks > 1)}, this run has {world.size}: converting it"
    )
    converted = world.run_and_sync_errors(lambda: _convert(found.path, target, stop) if world.is_main else True)
    if not all(world.gather_objects(converted)):
        raise Stopped("stopped by a signal while a checkpoint was converted")


def _convert(checkpoint: Path, target: Path, stop: StopRequest) -> bool:
    """Return whether the conversion has come to its end; False if a signal ended it. Raises UserError if it fails."""
    shutil.rmtree(target, ignore_errors=True)
    with without_patterns(checkpoint.parent) as folder:
        command = [
            sys.executable,
            *CONVERTER,
            "--input_folder",
            str(folder / checkpoint.name),
            "--output_folder",
            str(folder / target.name),
            "--num_extract_workers",
            "1",
            "--num_merge_workers",
            "1",
            "--inject_missing_state",
        ]  # which DeepSpeed wants of stages 1 and 2
        process = subprocess.Popen(
            die_with_parent(command, "KILL"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )  # Ctrl-C is for this process, which then ends that one
        errors = _wait_for_process(process, stop)
    if errors is None or process.returncode:
        shutil.rmtree(target, ignore_errors=True)
    if errors is None:
        return False
    if process.returncode:
        last = next((line for line in reversed(errors.splitlines()) if line.strip()), f"exit code {process.returncode}")
        raise UserError(
            f"{checkpoint} cannot be converted for another number of ranks ({last.strip()[:200]}); start with as many ranks as wrote "
            "it, or, where the disk is full, make room"
        )
    return True


def _wait_for_process(process: subprocess.Popen[str], stop: StopRequest) -> str | None:
    """Return what a process has written to standard error by its end; None if a signal came first, and the process was killed."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=CONVERSION_POLL)[1]
        if stop.received:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None


@contextlib.contextmanager
def without_patterns(folder: Path) -> Iterator[Path]:
    """Yield a path to a folder without special characters: DeepSpeed puts paths into glob patterns and regular expressions as they are."""
    if SAFE.fullmatch(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(dir=None if SAFE.fullmatch(tempfile.gettempdir()) else "/tmp") as temporary:
        link = Path(temporary) / "checkpoints"
        link.symlink_to(folder.absolute())
        yield link


def load(engine: deepspeed.DeepSpeedEngine, found: VerifiedCheckpoint, world: World) -> None:
    """Load a checkpoint that was found good, and converted where it had to be, into an engine on all ranks."""
    shards = found.load_path_for(world.size)
    optimizer = engine.optimizer.optimizer
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    with without_patterns(shards.parent) as folder:
        path, _ = engine.load_checkpoint(str(folder), tag=shards.name)
    assert path is not None, f"DeepSpeed did not load {shards}"
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group |= setting  # not those of the checkpoint: converted ones all have the weight decay of the first (DeepSpeed 0.19.8)
    for parameter, state in optimizer.state.items():
        # a counter of its own, where DeepSpeed gives all one that each then advances; on the device, where the fused step wants it
        state["step"] = state["step"].clone().to(parameter.device if optimizer.defaults["fused"] else "cpu")
    if shards != found.path:
        _load_frozen(engine, found.path, world)
    restore_random_state(found.path, world.rank)
    world.barrier()
    if world.is_main and shards != found.path:
        shutil.rmtree(shards, ignore_errors=True)
        (shards.parent / LATEST_UNIVERSAL).unlink(missing_ok=True)


def _load_frozen(engine: deepspeed.DeepSpeedEngine, checkpoint: Path, world: World) -> None:
    """Load the parameters that are not trained, which the universal format lacks; the main rank reads them for all."""
    frozen = {
        name.removeprefix("model."): parameter
        for name, parameter in engine.module.named_parameters()
        if not parameter.requires_grad
    }
    if not frozen:
        return
    weights = world.run_and_sync_errors(lambda: consolidate(checkpoint) if world.is_main else {})
    for name, parameter in frozen.items():
        with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if world.is_main:
                parameter.copy_(weights[name])
        if not hasattr(parameter, "ds_id"):  # else it was partitioned again, from the main rank's values
            world.broadcast(parameter.data)


def consolidate(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole fp32 state of the LanguageModel in a checkpoint, on CPU, without an engine.

    Raises UserError where the checkpoint is missing or damaged.
    """
    problem = check(checkpoint) if checkpoint.exists() else "there is no such folder"
    if problem:
        raise UserError(f"cannot use the checkpoint {checkpoint}: {problem}")
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        without_patterns(checkpoint.parent) as folder,
    ):
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=checkpoint.name)
    if (
        whole := checkpoint / WHOLE_MODULE
    ).exists():  # of stages 1 and 2; of stage 1 only this holds what is not trained
        module = torch.load(whole, map_location="cpu", mmap=True, weights_only=False)["module"]
        state |= {key: value.float() for key, value in module.items() if key not in state}
    return {key.removeprefix("model."): value for key, value in state.items()}
