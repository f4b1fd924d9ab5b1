"""Saving of checkpoints.

The training thread copies the state, a separate thread writes the files, and the folder is renamed once all ranks have
written. A failed save, for example because the disk is full, does not end the run: earlier checkpoints are kept, and
the next save is attempted.
"""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT, PARTITION_COUNT, ZERO_STAGE
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import nn

from pretrain.run_folder import list_steps, step_name
from pretrain.sections import CheckpointConfig
from pretrain.training import checkpoint
from pretrain.training.distributed import World
from pretrain.training.engine import full_shape
from pretrain.training.host_copies import HostCopies
from pretrain.training.random_state import random_state, random_state_file_name

BYTES_PER_PARAMETER = 12
"""Minimum size of a trained parameter in a checkpoint: the weight and two moments in fp32. A frozen parameter is saved
in its own type."""
SPACE_FACTOR = 1.1
"""Required disk space for a checkpoint, relative to the size of the previous one."""

Prepared = TypeVar("Prepared")
Written = tuple[dict[str, Any], str | None]
"""The manifest entries of a rank's files, and the problem if they could not all be written."""


@dataclass(frozen=True)
class _Save:
    """A save in progress."""

    step: int
    temporary: Path
    state: dict[str, Any]
    written: Future[Written]


class Saver:
    """The saver of an engine's checkpoints, one at a time, on all ranks together."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        folder: Path,
        config: CheckpointConfig,
        world: World,
        say: Callable[[str], None],
        saved: Callable[[int], None],
    ):
        self._engine, self._folder, self._config, self._world, self._say, self._on_saved = (
            engine,
            folder,
            config,
            world,
            say,
            saved,
        )
        self._copies = HostCopies(world.device)
        self._collector = engine.checkpoint_engine = _ShardCollector(self._copies)
        # DeepSpeed would write a script next to the shards, and that write could fail on rank 0 only.
        engine._copy_recovery_script = lambda folder: None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._save: _Save | None = None
        self._seconds = 0.0
        self.failed = 0
        """Number of failed saves."""
        self.problem: str | None = None
        """Problem of the last save, None if it succeeded."""
        self.duration = 0.0
        """Time from the beginning of the last save until this rank had written its files, in seconds."""

    @property
    def writing(self) -> bool:
        """Whether this rank is writing."""
        return self._save is not None and not self._save.written.done()

    @property
    def open(self) -> bool:
        """Whether a save has begun but is not finished."""
        return self._save is not None

    def pop_seconds(self) -> float:
        """Return the time that saving has taken on the training thread since the last call, in seconds."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def timed(self, prepare: Callable[[], Prepared]) -> Prepared:
        """Run a preparation of a save and return its result; its time counts as time of the save."""
        started = time.perf_counter()
        try:
            return prepare()
        finally:
            self._seconds += time.perf_counter() - started

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state of the run and write it, in the background if so configured. `state` must be plain JSON."""
        self.finish()
        started = time.perf_counter()
        temporary = self._folder / f".{step_name(step)}.tmp"
        problem = self._world.gather_objects(self._make_room(temporary) if self._world.is_main else None)[0]
        if problem:
            self._fail(step, temporary, problem)
        else:
            self._copies.begin()
            self._engine.save_checkpoint(str(self._folder), tag=temporary.name, save_latest=False)
            files = self._collector.take() | {temporary / random_state_file_name(self._world.rank): random_state()}
            self._save = _Save(step, temporary, state, self._thread.submit(_write, files, self._copies))
            self._save.written.add_done_callback(lambda _: self._note_duration(started))
        self._seconds += time.perf_counter() - started
        if not self._config.background:
            self.finish()

    def before_update(self) -> None:
        """Make the next optimizer step wait until the state is copied."""
        self._copies.before_change()

    def finish(self) -> None:
        """Wait until all ranks have written, and publish the checkpoint. All ranks must call this together."""
        if self._save is None:
            return
        started = time.perf_counter()
        save, self._save = self._save, None
        written = self._world.gather_objects(save.written.result())
        problem = next((problem for _, problem in written if problem), None)
        if problem is None and self._world.is_main:
            problem = self._publish(save, {file: entry for entries, _ in written for file, entry in entries.items()})
        problem = self._world.gather_objects(problem)[0]
        if problem:
            self._fail(save.step, save.temporary, problem)
        else:
            self.problem = None
            self._on_saved(save.step)
        self._seconds += time.perf_counter() - started

    def close(self) -> None:
        """Shut the writer thread down."""
        self._thread.shutdown()

    def _note_duration(self, started: float) -> None:
        self.duration = time.perf_counter() - started

    def _publish(self, save: _Save, files: dict[str, Any]) -> str | None:
        try:
            checkpoint.publish(save.temporary, save.step, self._world.size, save.state, files)
        except OSError as error:
            return _error_text(error)
        if kept := checkpoint.prune(self._folder, self._config.keep, self._config.keep_every):
            self._say(f"WARNING: old checkpoints cannot be removed: {', '.join(kept)}")
        return None

    def _fail(self, step: int, temporary: Path, problem: str) -> None:
        if self._world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.failed += 1
        self.problem = problem
        self._say(
            f"WARNING: the checkpoint of step {step} was not written: {problem}; the run continues, and earlier "
            f"checkpoints stay in {self._folder}"
        )

    def _make_room(self, temporary: Path) -> str | None:
        """Create an empty folder for a checkpoint; return the problem if there is no room, else None."""
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            free = shutil.disk_usage(self._folder).free
            needed = self._required_bytes()
        except OSError as error:
            return _error_text(error)
        return (
            f"the disk has {free / 1e6:,.1f} MB free, but a checkpoint needs {needed / 1e6:,.1f} MB: free disk space"
            if free < needed
            else None
        )

    def _required_bytes(self) -> float:
        newest = list_steps(self._folder)[-1:]
        before = sum(path.stat().st_size for step in newest for path in (self._folder / step_name(step)).iterdir())
        return SPACE_FACTOR * (before or min_checkpoint_bytes(self._engine.module))


def min_checkpoint_bytes(module: nn.Module) -> int:
    """Return the minimum size of a checkpoint of a module, in bytes."""
    return sum(
        full_shape(parameter).numel() * (BYTES_PER_PARAMETER if parameter.requires_grad else parameter.element_size())
        for parameter in module.parameters()
    )


class _ShardCollector(TorchCheckpointEngine):
    """A checkpoint engine for DeepSpeed that keeps copies of the shards, which are written later."""

    def __init__(self, copies: HostCopies) -> None:
        super().__init__()
        self._copies = copies
        self._files: dict[Path, Any] = {}

    def create(self, info: Any) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        copy_of_state = self._copies.copy(state_dict)
        if PARTITION_COUNT in copy_of_state.get(OPTIMIZER_STATE_DICT, {}):
            # under stage 1 the optimizer for bf16 with fp32 accumulation omits the stage, but the export needs it
            copy_of_state[OPTIMIZER_STATE_DICT].setdefault(ZERO_STAGE, 1)
        self._files[Path(path)] = copy_of_state

    def commit(self, info: Any) -> bool:
        return True

    def take(self) -> dict[Path, Any]:
        """Return the files saved since the last call."""
        files, self._files = self._files, {}
        return files


def _write(files: dict[Path, Any], copies: HostCopies) -> Written:
    """Write the files of this rank once the copies are complete."""
    entries = {}
    copies.wait()
    for path in list(files):
        try:
            with open(path, "wb") as file:
                torch.save(files.pop(path), file)
            entries[path.name] = checkpoint.manifest_entry(path)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a failed write
            return {}, _error_text(error)
    return entries, None


def _error_text(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
