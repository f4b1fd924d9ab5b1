"""Construction of a Trainer from a configuration: cheap checks first, the model last."""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar

from data_prep.layout import SpecialTokenIds
from data_prep.utils.console import UserError
from data_prep.utils.files import copy_folder, try_lock
from pretrain.config import RunConfig
from pretrain.data.corpus import Corpus
from pretrain.models.language_model import LanguageModel, special_ids
from pretrain.planning.flops import count_parameters, parameter_count
from pretrain.planning.plan import make_loader
from pretrain.planning.settings import engine_settings
from pretrain.relevant_env import relevant_env
from pretrain.run_folder import MODEL_DIR, list_steps, read_status, write_status
from pretrain.training import checkpoint, checkpoint_loading
from pretrain.training.branch import (
    SourcePin,
    branch_state,
    earlier_packings,
    read_branch,
    read_lineage,
    verified_checkpoint,
)
from pretrain.training.describe import check_same_run, previous_config, record_start
from pretrain.training.distributed import World
from pretrain.training.engine import build_engine
from pretrain.training.evaluation_requests import check_device, requested_evaluations, start_evaluations
from pretrain.training.extension import extend, larger_budget
from pretrain.training.hub_pushes import check_hub, start_push
from pretrain.training.loggers import check_trackers
from pretrain.training.loop import Trainer
from pretrain.training.start_checks import check
from pretrain.training.stop import StopRequest
from pretrain.training.throughput import Throughput
from pretrain.training.validation import Validation
from pretrain.training.weight_sums import check_weights, weight_sums

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class RunLock:
    """An exclusive lock on a run directory, held by the main rank until it releases the lock or its process ends."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._file: IO[bytes] | None = None
        self.held = False
        """Whether this run has the lock; the same on every rank."""

    def take(self, world: World) -> None:
        """Take the lock on all ranks together. Raises UserError if another run has it."""
        self._file = world.run_and_sync_errors(lambda: _lock_folder(self._run_dir) if world.is_main else None)
        self.held = True

    def release(self) -> None:
        """Release the lock."""
        self.held = False
        if self._file:
            self._file.close()


def set_up(
    config: RunConfig, world: World, stop: StopRequest | None = None, lock: RunLock | None = None
) -> Trainer | None:
    """Build the run, resumed from its newest checkpoint; return None if it is already finished.

    `stop` may already have received a signal; if it is None, signals are received from here on. This function takes the
    `lock`. Raises UserError, and Stopped if a signal ends the run during the set-up.
    """
    stop = stop or StopRequest()
    lock = lock or RunLock(config.run_dir)
    settings = engine_settings(config, world.size)
    _check_same_environment(world)
    corpus = world.run_and_sync_errors(lambda: Corpus(config.data.path, "train"))
    world.run_and_sync_errors(lambda: check(config, corpus))
    world.run_and_sync_errors(
        lambda: check_device(config.evaluation.device) if world.is_main and config.evaluation.every else None
    )
    world.run_and_sync_errors(lambda: check_hub(config.hub) if world.is_main else None)
    world.run_and_sync_errors(lambda: check_trackers(config) if world.is_main else None)
    lock.take(world)
    changes = world.run_and_sync_errors(
        lambda: check_same_run(config, corpus.manifest, world.size) if world.is_main else []
    )
    for change in changes:
        logger.info(f"note: resuming with a changed setting: {change}")
    world.run_and_sync_errors(lambda: _extend(config, corpus) if world.is_main else None)
    checkpoints = config.run_dir / "checkpoints"
    if list_steps(checkpoints) and read_status(config.run_dir).get("status") == "finished":
        logger.info(f"{config.run_dir} is already finished")
        _resume_background_work(config, world)
        return None
    if config.ignored_keys:
        logger.info(f"note: ignored with objective.name=next_token: {', '.join(config.ignored_keys)}")

    newest, lineage, pin = _find_start(config, corpus, settings["zero_optimization"], world, stop)
    trainer = _build_trainer(config, corpus, world, stop, newest, lineage)
    if pin:
        trainer.hooks.append(pin)
    if config.monitor.gradients_every and settings["zero_optimization"]["stage"] == 3:
        logger.info(
            "note: monitor.gradients_every makes ZeRO stage 3 gather each module separately, so all steps are slower"
        )
    if newest:
        started_anew = checkpoint_loading.load(trainer.engine, newest, world)
        check_weights(
            newest.state.get("weights"),
            weight_sums(trainer.engine.module, world),
            newest.path,
            started_anew,
        )
        trainer.resume(newest.state)
        logger.info(f"{'branching' if pin else 'resuming'} from step {trainer.progress.step}")

    def describe() -> None:
        _write_model_folder(config, trainer.engine.module.model, corpus)
        record_start(config, corpus.manifest, world.size, trainer.progress.step, changes, lineage)

    world.run_and_sync_errors(lambda: _report_write_errors(config, describe) if world.is_main else None)
    if world.is_main:
        write_status(config.run_dir, "running", trainer.progress.step)
    _resume_background_work(config, world)
    return trainer


def _extend(config: RunConfig, corpus: Corpus) -> None:
    """Go back to before the decay of the learning rate if the budget has become larger."""
    before = previous_config(config.run_dir)
    if before is not None and larger_budget(before, config.train):
        _report_write_errors(config, lambda: extend(config, before, corpus))


def _build_trainer(
    config: RunConfig,
    corpus: Corpus,
    world: World,
    stop: StopRequest,
    newest: checkpoint.VerifiedCheckpoint | None,
    lineage: Sequence[dict[str, Any]],
) -> Trainer:
    """Build the model, the engine and the loader. The state of the `newest` checkpoint is loaded later.

    `lineage` lists the runs that this run branches from.
    """
    universal = newest is not None and newest.needs_conversion(world.size)
    engine = world.run_and_sync_errors(
        lambda: build_engine(config, corpus.tokenizer, world, resuming=newest is not None, universal=universal)
    )
    model = engine.module.model
    specials = special_ids(corpus.tokenizer, model.vocab_size)
    layout = config.make_layout(specials, corpus.views)
    trainer = Trainer(
        config=config,
        world=world,
        engine=engine,
        specials=specials,
        objective=engine.module.objective,
        stop=stop,
        loader=world.run_and_sync_errors(
            lambda: make_loader(config, corpus, layout, earlier_packings(lineage, specials, corpus.views))
        ),
        throughput=Throughput(
            count_parameters(model, engine.module.objective), world.size, config.data.sequence_length
        ),
        validation=_validation(config, corpus, specials, world),
    )
    logger.info(
        f"{parameter_count(engine.module):,} parameters, {len(corpus):,} records, "
        f"{world.size} rank{'s' * (world.size > 1)} on {world.device.type}"
    )
    if numbers := trainer.objective.layers:
        logger.info(
            f"the objective reads the hidden states of layer {', '.join(map(str, numbers))} of {model.shape.layers} "
            "(0: token embeddings)"
        )
    if trainer.validation is None:
        logger.info("note: the corpus has no validation split, so there is no validation")
    return trainer


def _find_start(
    config: RunConfig, corpus: Corpus, zero: dict[str, Any], world: World, stop: StopRequest
) -> tuple[checkpoint.VerifiedCheckpoint | None, list[dict[str, Any]], SourcePin | None]:
    """Return the checkpoint that the run starts from, its lineage, and the pin of the checkpoint if it is of a source.

    A run with a checkpoint resumes from it. A branch without one starts from the checkpoint of its source, which is
    pinned. Raises UserError, and Stopped if a signal ends a conversion.
    """
    newest = _find_checkpoint(config.run_dir / "checkpoints", zero, world, stop)
    if config.branch_from is None:
        return newest, [], None
    pin = SourcePin(config)
    if newest is not None:
        if world.is_main:
            pin.release()
        return newest, read_lineage(config.run_dir), None
    branch = world.run_and_sync_errors(lambda: read_branch(config, corpus))
    if world.is_main:
        pin.set()
    for difference in branch.differences:
        logger.info(f"note: the branch differs from its source: {difference}")
    source = verified_checkpoint(branch, config, world)
    _convert(source, zero, world, stop)
    return replace(source, state=branch_state(branch, source.state)), branch.lineage, pin


def _find_checkpoint(
    folder: Path, zero: dict[str, Any], world: World, stop: StopRequest
) -> checkpoint.VerifiedCheckpoint | None:
    """Return the newest valid checkpoint; None if there is none.

    The checkpoint is converted if a different number of ranks wrote it. Raises UserError, and Stopped if a signal ends
    the conversion.
    """
    if world.is_main:
        checkpoint.remove_leftovers(folder)
    newest = checkpoint.find_newest(folder, world)
    if newest is not None:
        _convert(newest, zero, world, stop)
    return newest


def _convert(found: checkpoint.VerifiedCheckpoint, zero: dict[str, Any], world: World, stop: StopRequest) -> None:
    round_robin = zero["stage"] < 3 and zero.get("round_robin_gradients", False)
    checkpoint_loading.make_universal(found, world, stop, round_robin=round_robin)


def _resume_background_work(config: RunConfig, world: World) -> None:
    """Start the evaluations and the push that a killed run or job did not complete."""
    if world.is_main and requested_evaluations(config.run_dir):
        start_evaluations(config.run_dir, config.evaluation.device)
    if world.is_main and config.hub:
        start_push(config.run_dir, config.hub)


def _check_same_environment(world: World) -> None:
    """Warn about environment variables that are not the same on all ranks."""
    environments = world.gather_objects(relevant_env(os.environ))
    main = environments[0]
    differing = {
        name for other in environments for name in other.keys() | main.keys() if other.get(name) != main.get(name)
    }
    for name in sorted(differing):
        rank = next(rank for rank, other in enumerate(environments) if other.get(name) != main.get(name))
        logger.warning(
            f"{name} is {main.get(name)!r} for rank 0 on {world.hosts[0]}, but "
            f"{environments[rank].get(name)!r} for rank {rank} on {world.hosts[rank]}: set it in .deepspeed_env in the "
            "folder where the launcher is started, or in the environment of all nodes"
        )


def _report_write_errors(config: RunConfig, write: Callable[[], Result]) -> Result:
    """Return the result of `write`. Raises UserError if it cannot write."""
    try:
        return write()
    except OSError as error:
        raise UserError(f"cannot write to {config.run_dir} (output_dir/name): {error.strerror or error}") from None


def _lock_folder(run_dir: Path) -> IO[bytes]:
    """Return the lock file of a run directory, locked. Raises UserError if another run has locked it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = try_lock(run_dir / ".lock")
    except OSError as error:
        raise UserError(f"cannot write to {run_dir} (output_dir/name): {error.strerror}") from None
    if lock is None:
        raise UserError(f"another run is active in {run_dir}; wait for it, or choose another `name`")
    return lock


def _validation(config: RunConfig, corpus: Corpus, specials: SpecialTokenIds, world: World) -> Validation | None:
    if "validation" not in corpus.manifest["splits"]:
        return None
    held_out = world.run_and_sync_errors(lambda: Corpus(config.data.path, "validation"))
    layouts = config.validation_layouts(specials, corpus.views)
    return world.run_and_sync_errors(
        lambda: Validation(
            held_out,
            layouts,
            specials,
            config.data.sequence_length,
            config.monitor.validation_records,
            config.train.micro_batch_rows,
            world,
        )
    )


def _write_model_folder(config: RunConfig, model: LanguageModel, corpus: Corpus) -> None:
    """Write an export without weights: the configuration and the tokenizer of the model."""
    folder = config.run_dir / MODEL_DIR
    if folder.exists():
        return
    temporary = folder.with_name(f".{MODEL_DIR}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    copy_folder(corpus.folder / "tokenizer", temporary)
    model.causal_lm.config.save_pretrained(temporary)
    os.replace(temporary, folder)
