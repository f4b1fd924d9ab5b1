"""Saving of checkpoints.

The training thread copies the state, a separate thread writes the files, and the folder is renamed once all ranks have
written. A failed save, for example because the disk is full, does not end the run: earlier checkpoints are kept, and
the next save is attempted.
"""

import logging
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

from pretrain.models.hidden_matrices import full_shape
from pretrain.planning.budget import Progress
from pretrain.planning.memory import MUON_SAVING, OPTIMIZER_BYTES
from pretrain.run_folder import list_steps, step_name
from pretrain.sections import CheckpointConfig
from pretrain.training import checkpoint
from pretrain.training.distributed import World
from pretrain.training.host_copies import HostCopies
from pretrain.training.muon import MuonWithAdamW
from pretrain.training.random_state import random_state, random_state_file_name

logger = logging.getLogger(__name__)

SPACE_FACTOR = 1.1
"""Required disk space for a checkpoint, relative to the previous one or, for the first, to its minimum size."""

Result = TypeVar("Result")
WriteResult = tuple[dict[str, Any], str | None]
"""The manifest entries of a rank's files, and the problem, or None if all of them were written."""


@dataclass(frozen=True)
class _Save:
    """A save in progress."""

    step: int
    temporary: Path
    state: dict[str, Any]
    result: Future[WriteResult]


class Saver:
    """A writer of an engine's checkpoints: all ranks together write one checkpoint at a time.

    `on_saved` is called with the step of each complete checkpoint. The last checkpoint whose counters are in the stable
    phase of the learning rate (`is_stable`) is never removed; None if the schedule has no stable phase.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        folder: Path,
        config: CheckpointConfig,
        world: World,
        on_saved: Callable[[int], None],
        is_stable: Callable[[Progress], bool] | None,
    ):
        self._engine = engine
        self._folder = folder
        self._config = config
        self._world = world
        self._on_saved = on_saved
        self._is_stable = is_stable
        self._copies = HostCopies(world.device)
        self._collector = engine.checkpoint_engine = _ShardCollector(self._copies)
        # DeepSpeed would also write a recovery script on rank 0; if that failed, only rank 0 would raise an error.
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
        """Whether this rank is writing its files."""
        return self._save is not None and not self._save.result.done()

    @property
    def in_progress(self) -> bool:
        """Whether a save has begun but is not finished."""
        return self._save is not None

    def pop_seconds(self) -> float:
        """Return the time that saving has taken on the training thread since the last call, in seconds."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def timed(self, prepare: Callable[[], Result]) -> Result:
        """Run `prepare`, a step before a save, and return its result. Its duration counts as saving time."""
        started = time.perf_counter()
        try:
            return prepare()
        finally:
            self._seconds += time.perf_counter() - started

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state of the run and write it, in the background if so configured.

        `state` must be JSON-serializable.
        """
        self.finish()
        started = time.perf_counter()
        temporary = self._folder / f".{step_name(step)}.tmp"
        problem = self._world.gather_objects(self._create_folder(temporary) if self._world.is_main else None)[0]
        if problem:
            self._fail(step, temporary, problem)
        else:
            self._copies.begin()
            self._engine.save_checkpoint(str(self._folder), tag=temporary.name, save_latest=False)
            files = self._collector.take() | {temporary / random_state_file_name(self._world.rank): random_state()}
            self._save = _Save(step, temporary, state, self._thread.submit(_write, files, self._copies))
            self._save.result.add_done_callback(lambda _: self._note_duration(started))
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
        results = self._world.gather_objects(save.result.result())
        problem = next((problem for _, problem in results if problem), None)
        if problem is None and self._world.is_main:
            problem = self._publish(save, {file: entry for entries, _ in results for file, entry in entries.items()})
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
        if not_removed := checkpoint.prune(self._folder, self._config.keep, self._config.keep_every, self._is_stable):
            logger.warning(
                f"cannot remove old checkpoints in {self._folder}: {', '.join(not_removed)}; check the "
                "permissions, or remove them by hand"
            )
        return None

    def _fail(self, step: int, temporary: Path, problem: str) -> None:
        if self._world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.failed += 1
        self.problem = problem
        logger.warning(
            f"the checkpoint of step {step} was not written: {problem}; the run continues, and "
            f"{self._folder} still has the earlier checkpoints"
        )

    def _create_folder(self, temporary: Path) -> str | None:
        """Create an empty folder for a checkpoint.

        Return the problem if that fails or the disk lacks space, else None.
        """
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            free = shutil.disk_usage(self._folder).free
            needed = self._required_bytes()
        except OSError as error:
            return _error_text(error)
        if free >= needed:
            return None
        return (
            f"the disk has {free / 1e6:,.1f} MB free, but a checkpoint needs {needed / 1e6:,.1f} MB: delete files to "
            "make room"
        )

    def _required_bytes(self) -> float:
        newest = list_steps(self._folder)[-1:]
        previous_bytes = sum(
            path.stat().st_size for step in newest for path in (self._folder / step_name(step)).iterdir()
        )
        if previous_bytes:
            return SPACE_FACTOR * previous_bytes
        optimizer = self._engine.optimizer.optimizer
        by_muon = optimizer.size if isinstance(optimizer, MuonWithAdamW) else 0
        return SPACE_FACTOR * min_checkpoint_bytes(self._engine.module, by_muon)


def min_checkpoint_bytes(module: nn.Module, by_muon: int = 0) -> int:
    """Return the minimum size of a checkpoint of a module, in bytes. Muon trains `by_muon` of its parameters.

    A trained parameter is saved like the state of the optimizer, a frozen one in its own type.
    """
    saved = sum(
        full_shape(parameter).numel() * (OPTIMIZER_BYTES if parameter.requires_grad else parameter.element_size())
        for parameter in module.parameters()
    )
    return saved - MUON_SAVING * by_muon


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
            # the export needs the stage, but DeepSpeed's stage 1 optimizer for bf16 with fp32 accumulation omits it
            copy_of_state[OPTIMIZER_STATE_DICT].setdefault(ZERO_STAGE, 1)
        self._files[Path(path)] = copy_of_state

    def commit(self, info: Any) -> bool:
        return True

    def take(self) -> dict[Path, Any]:
        """Return the files saved since the last call."""
        files, self._files = self._files, {}
        return files


def _write(files: dict[Path, Any], copies: HostCopies) -> WriteResult:
    """Write the files of this rank once the copies are complete; return their manifest entries and the problem."""
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
