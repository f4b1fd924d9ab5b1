"""Branches: runs that start from a checkpoint of another run, and may continue it in a different way."""

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data_prep.layout import SpecialTokenIds
from data_prep.utils.config_file import validate
from data_prep.utils.console import UserError
from pretrain.config import RunConfig
from pretrain.data.corpus import Corpus
from pretrain.data.loader import Packing
from pretrain.objectives.base import ModelShape, build_objective
from pretrain.planning.budget import consumed_fraction
from pretrain.run_folder import PINS, list_steps, step_name
from pretrain.training import checkpoint
from pretrain.training.describe import (
    IMMUTABLE_ON_RESUME,
    changed_keys,
    completed_config,
    data_record,
    previous_config,
    read_environment,
    value_at,
)
from pretrain.training.distributed import World
from pretrain.training.extension import total_epoch_records
from pretrain.training.hooks import Hook

logger = logging.getLogger(__name__)

SAME_IN_BRANCH = (
    "model",
    "train.precision",
    "train.optimizer.name",
    *(key for key in IMMUTABLE_ON_RESUME if key.startswith("deepspeed.")),
)
"""Keys that a branch must share with its source: the checkpoint could not be loaded otherwise."""
NOT_COMPARED = ("name", "output_dir", "branch_from", "checkpoint", "export", "evaluation", "monitor")
"""Keys and sections whose differences are not listed: they do not change the training."""


@dataclass(frozen=True)
class Branch:
    """The start of a run from a checkpoint of its source."""

    checkpoint: Path
    config: RunConfig
    """Configuration of the source."""
    differences: list[str]
    """Differences between the two runs."""
    continues_data: bool
    """Whether the branch continues the data of its source: it has the same corpus, source weights and seed."""
    lineage: list[dict[str, Any]]
    """The sources of this run, the first run first: `run`, `step`, `differences`, `continues_data` and `config`."""
    used: float
    """Fraction of the budget that is used before the branch."""


def read_branch(config: RunConfig, corpus: Corpus) -> Branch:
    """Return the branch that a configuration describes. Raises UserError if it is not possible."""
    path, source, environment = _read_source(config)
    run_dir = path.parents[1]
    source_config = validate(RunConfig, source)
    now = completed_config(config)
    differing = [key for key in changed_keys(source, now) if key.split(".")[0] not in NOT_COMPARED]
    data = data_record(config, corpus.manifest)
    continues = (environment["data"], source["seed"]) == (data, config.seed)
    _check_shared_keys(run_dir, source, now, differing)
    _check_data(config, run_dir, source_config, environment["data"], data, continues)
    used = _used_budget(config, corpus, path)
    differences = [
        f"{key} is {value_at(now, key)}, was {value_at(source, key)}"
        for key in differing
        # the keys of an objective that is no longer used
        if "objective.name" not in differing or not key.startswith("objective.") or value_at(now, key) is not None
    ]
    if dropped := _check_weights(config, source_config):
        differences.append(f"these weights of the source are dropped: {', '.join(dropped)}")
    if not continues:
        differences.append("the data are read from the beginning, because the corpus, its weights or the seed differ")
    entry = {
        "run": str(run_dir.absolute()),
        "step": int(path.name.removeprefix("step-")),
        "differences": differences,
        "continues_data": continues,
        "config": source,
    }
    return Branch(path, source_config, differences, continues, [*environment.get("lineage", []), entry], used)


def _read_source(config: RunConfig) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Return the checkpoint of the source, and the source's configuration and environment.json."""
    assert config.branch_from is not None  # checked by the caller
    run_dir, step = Path(config.branch_from.run), config.branch_from.step
    source, environment = previous_config(run_dir), read_environment(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"branch_from.run: there is no folder {run_dir}; name the run directory of the source")
    if source is None or environment is None:
        raise UserError(
            f"branch_from.run: {run_dir} is not a run directory, because it has no config.yaml or no environment.json"
        )
    steps = list_steps(run_dir / "checkpoints")
    if step not in steps:
        listed = f"it has checkpoints of steps {', '.join(map(str, steps))}" if steps else "it has no checkpoints"
        raise UserError(f"branch_from.step: {run_dir} has no checkpoint of step {step}; {listed}")
    return run_dir / "checkpoints" / step_name(step), source, environment


def _check_shared_keys(run_dir: Path, source: dict[str, Any], now: dict[str, Any], differing: Sequence[str]) -> None:
    fixed = [key for key in differing if any(f"{key}.".startswith(f"{same}.") for same in SAME_IN_BRANCH)]
    if fixed:
        listed = ", ".join(f"{key} ({value_at(source, key)}, now {value_at(now, key)})" for key in fixed[:5])
        raise UserError(
            f"branch_from.run: {run_dir} has a different {listed}; a branch cannot change this; set the value of the "
            "source, or start a run without branch_from"
        )


def _check_data(
    config: RunConfig,
    run_dir: Path,
    source: RunConfig,
    before: dict[str, Any],
    now: dict[str, Any],
    continues: bool,
) -> None:
    """Raise UserError for a different tokenizer, or for a budget in epochs of other data."""
    if before["tokenizer"] != now["tokenizer"]:
        raise UserError(
            f"the tokenizer of {config.data.path} differs from the tokenizer of {run_dir}: prepare the data in a new "
            f"data.path with data.tokenizer={{path: {Path(source.data.path) / 'tokenizer'}}}"
        )
    if not continues and config.train.epochs is not None:
        raise UserError(
            "train.epochs counts the epochs of one corpus in one order, but this branch reads other data than "
            f"{run_dir}: set a budget in steps or tokens, which includes the steps before the branch"
        )


def _check_weights(config: RunConfig, source: RunConfig) -> list[str]:
    """Return the weights that the branch drops. Raises UserError if it cannot add or drop weights."""
    before, now = _added_weights(source), _added_weights(config)
    zero = config.deepspeed.get("zero_optimization", {})
    if before != now and zero.get("round_robin_gradients") and zero.get("stage", 3) < 3:
        raise UserError(
            "branch_from: a branch with deepspeed.zero_optimization.round_robin_gradients cannot add or drop weights, "
            "because DeepSpeed cannot convert its checkpoints; keep the objective"
        )
    return sorted(before.keys() - now.keys())


def _used_budget(config: RunConfig, corpus: Corpus, path: Path) -> float:
    """Return the fraction of the budget that is used at the source's checkpoint.

    Raises UserError if nothing is left, or if the manifest of the checkpoint cannot be read.
    """
    progress = checkpoint.read_progress(path)
    if progress is None:
        raise UserError(f"branch_from.step: the manifest of {path} cannot be read; choose another step")
    epoch_records = total_epoch_records(config, corpus, config.train.epochs)
    used = consumed_fraction(progress.consumed, config.train, epoch_records)
    if used >= 1:
        raise UserError(
            f"the budget of `train` is used up at step {progress.step} of the source ({progress.tokens:,} tokens, "
            f"{progress.records:,} records): raise it; it includes the steps before the branch"
        )
    return used


def read_lineage(run_dir: Path) -> list[dict[str, Any]]:
    """Return the sources of a branch with a checkpoint, the first run first. Raises UserError if they are unknown."""
    lineage: list[dict[str, Any]] = (read_environment(run_dir) or {}).get("lineage", [])
    if not lineage:
        raise UserError(
            f"{run_dir} is a branch, but the runs that it continues are unknown, because environment.json has no "
            "`lineage`: restore that file from a copy, or choose another `name`"
        )
    return lineage


def earlier_packings(lineage: Sequence[dict[str, Any]], specials: SpecialTokenIds, views: int) -> list[Packing]:
    """Return the packings of the runs whose data a run continues, the oldest first."""
    packings: list[Packing] = []
    for entry in lineage:
        config = validate(RunConfig, entry["config"])
        packing = Packing(config.make_layout(specials, views), config.data.sequence_length)
        packings = [*packings, packing] if entry["continues_data"] else []
    return packings


def verified_checkpoint(branch: Branch, config: RunConfig, world: World) -> checkpoint.VerifiedCheckpoint:
    """Return the verified checkpoint of a branch's source. Raises UserError if it is corrupt.

    All ranks must call this together.
    """
    found = checkpoint.verify(branch.checkpoint, world)
    if isinstance(found, str):
        raise UserError(f"branch_from: the checkpoint {branch.checkpoint} is corrupt: {found}; choose another step")
    return replace(
        found,
        folder=config.run_dir / "checkpoints",
        has_same_weights=_added_weights(branch.config) == _added_weights(config),
    )


def _added_weights(config: RunConfig) -> dict[str, Any]:
    """Return the shapes of the weights that the objective adds to a model, for any width and number of layers."""
    with torch.device("meta"):
        objective = build_objective(config.objective, ModelShape(width=8, layers=10**6))
    shapes = {name: tuple(weight.shape) for name, weight in objective.named_parameters()}
    return shapes | ({"predictor tokens": config.predictor_tokens} if config.predictor_tokens else {})


def branch_state(branch: Branch, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the source's checkpoint as the branch continues it.

    With a different objective or different data, the recent losses of the source are not comparable. Clipped steps of
    the source do not count.
    """
    changes: dict[str, Any] = {"owed": None, "clipped_steps": [0, 0]}
    if not branch.continues_data:
        changes["loader"] = {"epoch": 0, "window": 0, "row": 0}
    if not branch.continues_data or any(line.startswith(("objective", "data")) for line in branch.differences):
        changes["losses"] = {}
    return state | changes


class SourcePin(Hook):
    """A pin that keeps the source's checkpoint until the branch has a checkpoint."""

    def __init__(self, config: RunConfig):
        assert config.branch_from is not None  # checked by the caller
        folder = Path(config.branch_from.run) / "checkpoints" / PINS
        owner = hashlib.sha256(str(config.run_dir.resolve()).encode()).hexdigest()[:12]
        self._path = folder / f"{step_name(config.branch_from.step)}.branch-{owner}"

    def set(self) -> None:
        """Create the pin. Without permission to write to the source, only warn."""
        try:
            self._path.parent.mkdir(exist_ok=True)
            self._path.touch()
        except OSError as error:
            logger.warning(
                f"cannot pin the checkpoint of the source ({error.strerror}: {self._path}); "
                "if that run is active, it may remove the checkpoint"
            )

    def release(self) -> None:
        """Remove the pin."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def after_save(self, run: Any, step: int) -> None:
        """Remove the pin, because the branch has a checkpoint."""
        if run.world.is_main:
            self.release()
