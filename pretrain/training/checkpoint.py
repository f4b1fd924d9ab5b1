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

from data_prep.utils.console import UserError
from data_prep.utils.files import sha256_file, sync_folder, write_text
from pretrain.models.hidden_matrices import full_shape
from pretrain.planning.budget import Progress
from pretrain.run_folder import PINS, list_steps, step_name
from pretrain.training.distributed import World
from pretrain.training.evaluation_requests import die_with_parent
from pretrain.training.muon import MuonWithAdamW
from pretrain.training.random_state import restore_random_state
from pretrain.training.stop import Stopped, StopRequest

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
"""File that DeepSpeed writes next to a converted checkpoint."""
DAMAGE_FILE = "damage.txt"
PLAIN_PATH = re.compile(r"[\w/.-]*", re.ASCII)
"""Paths that are safe in glob patterns and in regular expressions, in which a dot also matches a dot."""
UNPARTITIONED_WEIGHTS = "mp_rank_00_model_states.pt"
"""File of a checkpoint with the weights of the forward pass, if they are not partitioned."""
CONVERTER = ["-m", "deepspeed.checkpoint.ds_to_universal"]
"""Python arguments that start the conversion to a different number of ranks."""
CONVERSION_POLL = 0.2
"""Interval between checks for a signal during a conversion, in seconds."""
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


def make_universal(found: VerifiedCheckpoint, world: World, stop: StopRequest, round_robin: bool = False) -> None:
    """Convert a checkpoint of a different number of ranks to DeepSpeed's universal format.

    The main rank writes the converted checkpoint next to the original. Raises UserError if the conversion fails or the
    run uses `round_robin` gradients, and Stopped if a signal ends the conversion.
    """
    target = found.load_path_for(world.size)
    if target == found.path:
        return
    if round_robin:
        raise UserError(
            f"{found.path} was written by {found.ranks} rank{'s' * (found.ranks > 1)} with "
            "deepspeed.zero_optimization.round_robin_gradients, and DeepSpeed cannot load that on another number of "
            f"ranks: start with {found.ranks}"
        )
    reason = (
        f"was written by {found.ranks} rank{'s' * (found.ranks > 1)}, this run has {world.size}"
        if found.ranks != world.size
        else "does not have the same weights as this run"
    )
    logger.info(f"{found.path} {reason}: converting it")
    converted = world.run_and_sync_errors(lambda: _convert(found.path, target, stop) if world.is_main else True)
    if not all(world.gather_objects(converted)):
        raise Stopped("stopped by a signal while converting a checkpoint")


def _convert(checkpoint: Path, target: Path, stop: StopRequest) -> bool:
    """Return True once the conversion is complete, False if a signal ended it. Raises UserError if it fails."""
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with without_patterns(checkpoint.parent) as folder, without_patterns(target.parent) as target_folder:
        command = [
            sys.executable,
            *CONVERTER,
            "--input_folder",
            str(folder / checkpoint.name),
            "--output_folder",
            str(target_folder / target.name),
            "--num_extract_workers",
            "1",
            "--num_merge_workers",
            "1",
            "--inject_missing_state",  # required by DeepSpeed for stages 1 and 2
        ]
        process = subprocess.Popen(
            die_with_parent(command, "KILL"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C must reach this process only, which then ends the conversion
        )
        errors = _wait_for_process(process, stop)
    if errors is None or process.returncode:
        shutil.rmtree(target, ignore_errors=True)
    if errors is None:
        return False
    if process.returncode:
        last = next((line for line in reversed(errors.splitlines()) if line.strip()), f"exit code {process.returncode}")
        raise UserError(
            f"{checkpoint} cannot be converted for another number of ranks ({last.strip()[:200]}); start with the "
            "number of ranks that wrote it, or free disk space if the disk is full"
        )
    return True


def _wait_for_process(process: subprocess.Popen[str], stop: StopRequest) -> str | None:
    """Wait for a process and return its standard error; kill it and return None if a signal arrives first."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=CONVERSION_POLL)[1]
        if stop.received:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None


@contextlib.contextmanager
def without_patterns(folder: Path) -> Iterator[Path]:
    """Yield a path to `folder` without special characters, through a symbolic link if necessary.

    DeepSpeed puts paths unescaped into glob patterns and regular expressions.
    """
    if PLAIN_PATH.fullmatch(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(dir=None if PLAIN_PATH.fullmatch(tempfile.gettempdir()) else "/tmp") as temporary:
        link = Path(temporary) / "checkpoints"
        link.symlink_to(folder.absolute())
        yield link


def load(engine: deepspeed.DeepSpeedEngine, found: VerifiedCheckpoint, world: World) -> list[str] | None:
    """Load a verified checkpoint, converted if necessary, into an engine on all ranks.

    Return the weights that it lacks and that therefore start anew; None if it has exactly the weights of the engine.
    """
    shards = found.load_path_for(world.size)
    optimizer = engine.optimizer.optimizer
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    started_anew = None if found.has_same_weights else _complete(shards, engine, world)
    with without_patterns(shards.parent) as folder:
        path, _ = engine.load_checkpoint(str(folder), tag=shards.name)
    assert path is not None, f"DeepSpeed did not load {shards}"
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        # The checkpoint's settings are not used: after a conversion all groups have the weight decay of the first
        # (DeepSpeed 0.19.8).
        group |= setting
    if isinstance(optimizer, MuonWithAdamW):
        optimizer.drop_placeholders()
    for parameter, state in optimizer.state.items():
        # DeepSpeed lets all parameters share one step counter, and each of them would advance it, so copy the counter
        # for each parameter. The fused step needs the counter on the device.
        state["step"] = state["step"].clone().to(parameter.device if optimizer.defaults["fused"] else "cpu")
    if shards != found.path:
        _load_frozen(engine, found.path, world)
    restore_random_state(found.path, world.rank)
    world.barrier()
    if world.is_main and shards != found.path:
        shutil.rmtree(shards, ignore_errors=True)
        (shards.parent / LATEST_UNIVERSAL).unlink(missing_ok=True)
    return started_anew


def _complete(converted: Path, engine: deepspeed.DeepSpeedEngine, world: World) -> list[str]:
    """Add the trained parameters of an engine that a converted checkpoint lacks or has in a different size.

    They have the values in the engine, and an optimizer state of zeros. Return their names.
    """
    trained = {name: weight for name, weight in engine.module.named_parameters() if weight.requires_grad}
    folder = converted / "zero"
    missing: list[str] = world.gather_objects(
        [name for name, weight in trained.items() if _saved_size(folder / name) != full_shape(weight).numel()]
        if world.is_main
        else None
    )[0]
    if missing:
        logger.info(f"note: these weights are not in the checkpoint and start anew: {', '.join(missing)}")
    example = next((folder / name for name in trained if name not in missing), None)
    for name in missing:
        with torch.no_grad(), deepspeed.zero.GatheredParameters([trained[name]]):
            if world.is_main:
                _write_parameter(folder / name, trained[name], example)
    world.barrier()
    return missing


def _saved_size(folder: Path) -> int:
    """Return the number of elements of a parameter in the universal format; 0 if it is missing."""
    path = folder / "fp32.pt"
    if not path.exists():
        return 0
    saved = torch.load(path, mmap=True, weights_only=False)
    values: torch.Tensor = saved["param"] if isinstance(saved, dict) else saved  # stage 3 saves flat tensors
    return values.numel()


def _write_parameter(folder: Path, weight: torch.Tensor, example: Path | None) -> None:
    """Write a parameter in the universal format, with the same files as the parameter in `example`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    assert example is not None  # the weights of the model are in the checkpoint
    values = weight.detach().float().cpu()
    for path in example.glob("*.pt"):
        if path.name == "step.pt":
            shutil.copy(path, folder)
        else:
            torch.save({"param": values if path.name == "fp32.pt" else torch.zeros_like(values)}, folder / path.name)


def _load_frozen(engine: deepspeed.DeepSpeedEngine, checkpoint: Path, world: World) -> None:
    """Load the frozen parameters, which the universal format lacks. The main rank reads them for all ranks."""
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
        if not hasattr(parameter, "ds_id"):  # a partitioned parameter already has the main rank's values
            world.broadcast(parameter.data)


def consolidate(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the complete fp32 state of the LanguageModel in a checkpoint, on CPU, without an engine.

    Raises UserError if the checkpoint is missing or corrupt.
    """
    problem = check(checkpoint) if checkpoint.exists() else "the folder does not exist"
    if problem:
        raise UserError(f"cannot use the checkpoint {checkpoint}: {problem}")
    with (
        open(os.devnull, "w") as devnull,
        contextlib.redirect_stdout(devnull),
        contextlib.redirect_stderr(devnull),
        without_patterns(checkpoint.parent) as folder,
    ):
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=checkpoint.name)
    # Stages 1 and 2 write this file. Under stage 1 only this file contains the frozen parameters.
    if (unpartitioned := checkpoint / UNPARTITIONED_WEIGHTS).exists():
        module = torch.load(unpartitioned, map_location="cpu", mmap=True, weights_only=False)["module"]
        state |= {key: value.float() for key, value in module.items() if key not in state}
    return {key.removeprefix("model."): value for key, value in state.items()}
