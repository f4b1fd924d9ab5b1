"""Extension of a run: the same command with a larger budget continues before the decay of the learning rate."""

import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.utils.console import UserError
from data_prep.utils.files import write_json
from pretrain.config import RunConfig
from pretrain.data.corpus import Corpus, source_weights
from pretrain.data.loader import make_order
from pretrain.planning.budget import Progress
from pretrain.run_folder import (
    PINS,
    REWINDS,
    list_steps,
    read_rewinds,
    remove_later_steps,
    step_name,
    write_status,
)
from pretrain.sections import BUDGETS, DECAYS, WARMUPS, TrainConfig
from pretrain.training import checkpoint
from pretrain.training.schedule import is_before_decay

logger = logging.getLogger(__name__)

DECAYED = "decayed-"
"""Prefix of the last checkpoint and the last export of the shorter run, which are kept under this name."""


MAY_DIFFER = tuple(f"train.{key}" for key in (*BUDGETS, *WARMUPS, *DECAYS))
"""Keys that may differ in an extended run."""


def larger_budget(before: Mapping[str, Any], train: TrainConfig) -> str | None:
    """Return the key of the budget if it is larger than in the earlier configuration of the run, else None."""
    (budget,) = (key for key in BUDGETS if getattr(train, key) is not None)
    return budget if getattr(train, budget) > (before["train"].get(budget) or math.inf) else None


def check_extension(before: Mapping[str, Any], config: RunConfig, budget: str) -> None:
    """Raise UserError if steps before the decay would have been different with the larger budget.

    `before` is the earlier configuration of the run.
    """
    now, earlier = config.train, TrainConfig.model_validate(before["train"])
    change = f"{config.run_dir} cannot be extended from train.{budget}={getattr(earlier, budget)} to "
    change += str(getattr(now, budget))
    alternative = (
        f"start a new run from one of its checkpoints, with branch_from.run={config.run_dir} and branch_from.step"
    )
    if now.schedule != "warmup_stable_decay":
        raise UserError(
            f"{change}: with train.schedule={now.schedule}, every learning rate depends on the budget; {alternative}, "
            "and use warmup_stable_decay for runs that may grow"
        )
    if config.objective.changes_during_run:
        raise UserError(
            f"{change}: objective has a schedule over fractions of the budget (active, weight_schedule or dropout), "
            f"so its earlier steps would have been different; {alternative}"
        )
    length = earlier.warmup_share * getattr(earlier, budget)
    if not math.isclose(length, now.warmup_share * getattr(now, budget), rel_tol=1e-9):
        key = f"warmup_{budget}"
        if budget in ("steps", "tokens") and math.isclose(length, round(length)):
            same = {"warmup_fraction": "null", key: str(round(length))}
        else:
            same = {"warmup_fraction": f"{length / getattr(now, budget):.12g}"}
            same |= {key: "null"} if getattr(now, key, None) is not None else {}
        settings = " ".join(f"train.{key}={value}" for key, value in same.items())
        raise UserError(
            f"{change}: the warm-up would take {now.warmup_share * getattr(now, budget):g} {budget} instead of "
            f"{length:g}, so its learning rates would have been different; set {settings} to keep it, or {alternative}"
        )


def total_epoch_records(config: RunConfig, corpus: Corpus, epochs: int | None) -> int:
    """Return the number of records in `epochs` epochs; 0 for a budget in a different unit (None)."""
    order = make_order(corpus, config.seed, source_weights(corpus.manifest, config.data.sources))
    return order.records_in_epochs(epochs or 0)


def step_to_extend(config: RunConfig, before: Mapping[str, Any], corpus: Corpus) -> int | None:
    """Return the step of the checkpoint from which the run is extended; None if it has no checkpoints.

    `before` is the earlier configuration of the run. The checkpoint is before the decay of both configurations. Raises
    UserError if there is none.
    """
    folder = config.run_dir / "checkpoints"
    steps = list_steps(folder)
    if not steps:
        return None
    earlier = TrainConfig.model_validate(before["train"])
    records = {epochs: total_epoch_records(config, corpus, epochs) for epochs in (earlier.epochs, config.train.epochs)}

    def is_stable(progress: Progress) -> bool:
        return all(is_before_decay(train, records[train.epochs], progress) for train in (earlier, config.train))

    step = checkpoint.last_stable_step(folder, is_stable)
    if step is None:
        raise UserError(
            f"{config.run_dir} cannot be extended: it has no checkpoint from before the decay of the learning rate; "
            f"the first one is of step {steps[0]}"
        )
    return step


def extend(config: RunConfig, before: Mapping[str, Any], corpus: Corpus) -> None:
    """Make the run continue from its last checkpoint before the decay of the smaller budget.

    `before` is the earlier configuration of the run. The last checkpoint and the last export of the decay are renamed,
    and the earlier ones are removed. Raises UserError, before anything is changed, if there is no valid checkpoint
    before the decay, or if a branch is starting from a checkpoint of the decay.
    """
    folder = config.run_dir / "checkpoints"
    resume_step = step_to_extend(config, before, corpus)
    if resume_step is None:
        return
    newest = list_steps(folder)[-1]
    if newest > resume_step:
        if problem := checkpoint.check(folder / step_name(resume_step)):
            raise UserError(
                f"{config.run_dir} cannot be extended: {step_name(resume_step)}, its last checkpoint from before the "
                f"decay of the learning rate, is corrupt ({problem}); remove it to use an earlier one"
            )
        _check_branches(folder, resume_step)
        undone = {"step": newest, "to": resume_step, "left_out": [], "extended": True}
        write_json(config.run_dir / REWINDS, [*read_rewinds(config.run_dir), undone])
        for parent in (folder, config.run_dir / "export"):
            if saved := list_steps(parent)[-1:]:
                _keep_as_decayed(parent / step_name(saved[0]), saved[0] > resume_step)
        (folder / PINS / step_name(newest)).unlink(missing_ok=True)
        remove_later_steps(config.run_dir, resume_step)
        checkpoint.point_to(folder, resume_step)
        logger.info(
            f"note: the run is extended; it continues from step {resume_step}, before the decay of the learning rate. "
            f"The checkpoint of step {newest} is kept as {folder / (DECAYED + step_name(newest))}"
        )
    write_status(config.run_dir, "resumable", resume_step, "extended")


def _check_branches(folder: Path, resume_step: int) -> None:
    """Raise UserError if a branch without a checkpoint has pinned a checkpoint that would be removed."""
    for pin in sorted((folder / PINS).glob("*.branch-*")):
        if pin.name.partition(".")[0] > step_name(resume_step):
            raise UserError(
                f"{folder.parent} cannot be extended while a branch starts from {pin.name.partition('.')[0]}: wait "
                f"until it has a checkpoint, or remove {pin} if there is no such branch"
            )


def _keep_as_decayed(path: Path, is_decayed: bool) -> None:
    if is_decayed:
        kept = path.with_name(DECAYED + path.name)
        shutil.rmtree(kept, ignore_errors=True)
        path.replace(kept)
