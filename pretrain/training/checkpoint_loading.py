"""The loading of verified checkpoints: into an engine, after a conversion if necessary, or as complete weights.

DeepSpeed converts a checkpoint to its universal format if the number of ranks or the weights differ.
"""

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from data_prep.utils.console import UserError
from pretrain.models.hidden_matrices import full_shape
from pretrain.training.checkpoint import LATEST_UNIVERSAL, VerifiedCheckpoint, check
from pretrain.training.distributed import World
from pretrain.training.evaluation_requests import die_with_parent
from pretrain.training.muon import MuonWithAdamW
from pretrain.training.random_state import restore_random_state
from pretrain.training.stop import Stopped, StopRequest

logger = logging.getLogger(__name__)

PLAIN_PATH = re.compile(r"[\w/.-]*", re.ASCII)
"""Paths that are safe in glob patterns and in regular expressions, in which a dot also matches a dot."""
UNPARTITIONED_WEIGHTS = "mp_rank_00_model_states.pt"
"""File of a checkpoint with the weights of the forward pass, if they are not partitioned."""
CONVERTER = ["-m", "deepspeed.checkpoint.ds_to_universal"]
"""Python arguments that start the conversion to a different number of ranks."""
CONVERSION_POLL = 0.2
"""Interval between checks for a signal during a conversion, in seconds."""


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
