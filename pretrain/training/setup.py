"""Construction of a Trainer from a configuration: cheap checks first, the model last."""

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from data_prep.config import evaluation_tests
from data_prep.layout import Layout, SpecialTokenIds, positions_needed
from data_prep.selection.task_contexts import list_test_files
from data_prep.tokenizer import find_tokenizer, import_tokenizer
from data_prep.tokenizer_difference import first_difference
from data_prep.units import Job
from data_prep.utils.console import UserError
from data_prep.utils.files import copy_folder, sha256_file, try_lock
from pretrain.config import RunConfig
from pretrain.data.corpus import Corpus, check_data_section, source_weights
from pretrain.models.language_model import LanguageModel, special_ids
from pretrain.objectives.base import build_objective
from pretrain.planning.flops import count_parameters, parameter_count
from pretrain.planning.plan import make_loader
from pretrain.planning.settings import engine_settings
from pretrain.relevant_env import relevant_env
from pretrain.run_folder import MODEL_DIR, list_steps, read_status, write_status
from pretrain.tasks.options import check_package
from pretrain.training import checkpoint
from pretrain.training.describe import check_same_run, record_start
from pretrain.training.distributed import World
from pretrain.training.engine import build_engine
from pretrain.training.evaluation_requests import check_device, requested_evaluations, start_evaluations
from pretrain.training.loop import Trainer
from pretrain.training.stop import StopRequest
from pretrain.training.throughput import Throughput
from pretrain.training.validation import Validation
from pretrain.training.weight_sums import check_weights, weight_sums

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
LENGTHS_AT_ONCE = 1 << 18
"""Number of records whose lengths are read together."""


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
    lock.take(world)
    changes = world.run_and_sync_errors(
        lambda: check_same_run(config, corpus.manifest, world.size) if world.is_main else []
    )
    for change in changes:
        logger.info(f"note: resuming with a changed setting: {change}")
    checkpoints = config.run_dir / "checkpoints"
    if list_steps(checkpoints) and read_status(config.run_dir).get("status") == "finished":
        logger.info(f"{config.run_dir} is already finished")
        _resume_evaluations(config, world)
        return None
    if config.ignored_keys:
        logger.info(f"note: ignored with objective.name=next_token: {', '.join(config.ignored_keys)}")

    newest = _find_checkpoint(checkpoints, settings["zero_optimization"], world, stop)
    universal = newest is not None and newest.ranks != world.size
    objective = build_objective(config.objective)
    engine = world.run_and_sync_errors(
        lambda: build_engine(
            config, corpus.tokenizer, objective, world, resuming=newest is not None, universal=universal
        )
    )
    model = engine.module.model
    specials = special_ids(corpus.tokenizer, model.vocab_size)
    layout = config.make_layout(specials, corpus.views)
    trainer = Trainer(
        config=config,
        world=world,
        engine=engine,
        specials=specials,
        objective=objective,
        stop=stop,
        loader=world.run_and_sync_errors(lambda: make_loader(config, corpus, layout)),
        throughput=Throughput(count_parameters(model), world.size, config.data.sequence_length),
        validation=_validation(config, corpus, specials, world),
    )
    logger.info(
        f"{parameter_count(model):,} parameters, {len(corpus):,} records, {world.size} rank{'s' * (world.size > 1)} on "
        f"{world.device.type}"
    )
    if trainer.validation is None:
        logger.info("note: the corpus has no validation split, so there is no validation")
    if config.monitor.gradients_every and settings["zero_optimization"]["stage"] == 3:
        logger.info(
            "note: monitor.gradients_every makes ZeRO stage 3 gather each module separately, so all steps are slower"
        )
    if newest:
        checkpoint.load(engine, newest, world)
        check_weights(newest.state.get("weights"), weight_sums(engine.module, world), newest.path)
        trainer.resume(newest.state)
        logger.info(f"resuming from step {trainer.progress.step}")

    def describe() -> None:
        _write_model_folder(config, model, corpus)
        record_start(config, corpus.manifest, world.size, trainer.progress.step, changes)

    world.run_and_sync_errors(lambda: _report_write_errors(config, describe) if world.is_main else None)
    if world.is_main:
        write_status(config.run_dir, "running", trainer.progress.step)
    _resume_evaluations(config, world)
    return trainer


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
        checkpoint.make_universal(
            newest, world, stop, round_robin=zero["stage"] < 3 and zero.get("round_robin_gradients", False)
        )
    return newest


def _resume_evaluations(config: RunConfig, world: World) -> None:
    """Start the evaluations that a killed run or evaluation job did not complete."""
    if world.is_main and requested_evaluations(config.run_dir):
        start_evaluations(config.run_dir, config.evaluation.device)


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


def check(config: RunConfig, corpus: Corpus | None) -> None:
    """Raise UserError for errors that can be found before the model is built.

    If there is no corpus, the checks that need its shards are skipped.
    """
    if corpus is not None:
        _check_views(config, corpus)
        source_weights(corpus.manifest, config.data.sources)
        check_data_section(config.data, corpus.manifest)
        if config.model.init_from is not None and not list_steps(config.run_dir / "checkpoints"):
            _check_same_tokenizer(config.model.init_from, corpus)
        corpus.read(np.array([0, len(corpus) - 1]))  # reports missing shards early
        _check_pairs(config, corpus)
        _check_lengths(config, corpus)
    if config.model.lora:
        check_package("peft", "lora", "model.lora")
    for number, task in enumerate(config.evaluation.tasks):
        task.check_requirements(config.data, f"evaluation.tasks.{number}")
    if corpus is not None and config.data.decontaminate:
        _check_decontaminated(config, corpus)
    steps = list_steps(config.run_dir / "checkpoints")
    if config.checkpoint.resume == "never" and steps:
        raise UserError(
            f"checkpoint.resume is never, but {config.run_dir} contains checkpoints up to step {steps[-1]}; "
            "choose another `name`, or remove that folder"
        )
    if config.checkpoint.resume == "must" and not steps:
        raise UserError(
            f"checkpoint.resume is must, but {config.run_dir} contains no checkpoint; set it to auto to start a new run"
        )


def _check_decontaminated(config: RunConfig, corpus: Corpus) -> None:
    """Warn about test files that data_prep did not compare with the training data."""
    settings = corpus.manifest["settings"]
    compared = settings["data"].get("decontaminate", True)
    compared_hashes = {file["sha256"] for file in settings.get("files", {}).values()} if compared else set()
    recorded = settings.get("tests", []) if compared else []
    for test in evaluation_tests(config.data, config.evaluation.model_dump(mode="json", exclude_none=True)):
        (described,) = Job(data=config.data, tests=(test,)).test_descriptions
        files = list_test_files(test)
        not_compared: list[str | None]
        if files:
            not_compared = [path for path in files if sha256_file(Path(path)) not in compared_hashes]
        else:
            not_compared = [] if described in recorded else [test.source.path]
        if not_compared:
            logger.warning(
                f"{config.data.path} was not decontaminated against {not_compared[0]} (task {test.task}): its "
                "questions may be in the training data; prepare a different data.path with this configuration, or set "
                "data.decontaminate=false"
            )


def _check_views(config: RunConfig, corpus: Corpus) -> None:
    if tuple(corpus.manifest["views"]) != config.data.views:
        raise UserError(
            f"data.views are {list(config.data.views)}, but {config.data.path} was prepared with "
            f"{corpus.manifest['views']}: set data.views to these, or prepare a different data.path"
        )


def _check_same_tokenizer(folder: str, corpus: Corpus) -> None:
    """Raise UserError if the model in a folder was not trained with the token ids of the corpus."""
    if not Path(folder).is_dir():
        return  # loading the model reports the missing folder
    try:
        find_tokenizer(Path(folder))
    except UserError:
        logger.info(
            f"note: model.init_from: {folder} has no tokenizer, so it is unknown whether its model was trained with "
            "the token ids of the corpus"
        )
        return
    with tempfile.TemporaryDirectory() as temporary:
        model_tokenizer = import_tokenizer(Path(folder), Path(temporary) / "tokenizer", notes_level=logging.DEBUG)
        difference = first_difference(model_tokenizer, corpus.tokenizer)
    if difference is not None:
        raise UserError(
            f"model.init_from: the tokenizer of {folder} differs from the tokenizer of {corpus.folder} ({difference}); "
            f"prepare the corpus with data.tokenizer.path set to {folder}"
        )


def _check_pairs(config: RunConfig, corpus: Corpus) -> None:
    """Raise UserError if no record has the pairs or spans that the objective needs."""
    layout = config.make_layout(SpecialTokenIds(0, 0, 0, 0, 0), corpus.views)
    if corpus.entry["incomplete"] < len(corpus):
        return  # some record has all views
    for lengths in _all_lengths(corpus):
        all_paired = np.ones(len(lengths), bool)
        segment_lengths = layout.segment_lengths(lengths, all_paired)
        pairs, spans = layout.pairs(segment_lengths, all_paired), layout.count_spans(segment_lengths)
        if (pairs.any() or not layout.read_outs) and (spans.any() or not layout.spans):
            return
    raise UserError(
        f"objective.name is {config.objective.name}, but no record of {config.data.path} has two views: "
        "choose next_token, or check data.views and the columns of the sources"
    )


def _all_lengths(corpus: Corpus) -> Iterator[np.ndarray]:
    """Yield the lengths of all records in batches (n, views)."""
    for start in range(0, len(corpus), LENGTHS_AT_ONCE):
        yield corpus.lengths(np.arange(start, min(start + LENGTHS_AT_ONCE, len(corpus))))


def _check_lengths(config: RunConfig, corpus: Corpus) -> None:
    """Raise UserError if a record, with all copies that the objective or the validation needs, is longer than a row."""
    length = config.data.sequence_length
    specials = SpecialTokenIds(0, 0, 0, 0, 0)  # the layout needs only their number

    def longest(split: Corpus, validating: bool) -> int:
        layout = config.make_layout(specials, split.views, validating=validating)
        bound = min(layout.positions(split.longest).max(), _max_positions_from_manifest(split, layout))
        if bound <= length:
            return bound
        if len(split) > LENGTHS_AT_ONCE:
            logger.info(
                f"note: reading the lengths of {len(split):,} records, because the manifest does not show whether all "
                f"fit data.sequence_length={length}"
            )
        return max(layout.positions(lengths).max() for lengths in _all_lengths(split))

    needed = longest(corpus, validating=False)
    if "validation" in corpus.manifest["splits"]:
        needed = max(needed, longest(Corpus(config.data.path, "validation"), validating=True))
    if needed > length:
        raise UserError(
            f"data.sequence_length is {length}, too short for the records of {config.data.path} with this objective: "
            f"the longest needs {needed} positions; raise it, or prepare the corpus again with a smaller "
            "data.sequence_length, which drops and counts longer records"
        )


def _max_positions_from_manifest(corpus: Corpus, layout: Layout) -> float:
    """Return an upper bound of the positions of a record, from `positions_needed` of the manifest.

    The bound is infinite if the layout may need more positions than `positions_needed` counts. For each number of
    present views, both numbers are linear in the lengths. It is therefore enough to compare them for lengths of 1, and
    for one very long view at a time.
    """
    shapes = np.concatenate(
        [
            (np.ones((count + 1, corpus.views)) + np.eye(count + 1, corpus.views, -1) * 10**6)
            * (np.arange(corpus.views) < count)
            for count in range(1, corpus.views + 1)
        ]
    ).astype(np.int64)
    if (layout.positions(shapes) > positions_needed(shapes)).any():
        return math.inf
    # data_prep cuts documents into pieces that fit its data.sequence_length
    piece_length = corpus.manifest["settings"]["data"]["sequence_length"] if corpus.entry["continued"] else 0
    return max(corpus.entry["positions_needed"], piece_length)


def _validation(config: RunConfig, corpus: Corpus, specials: SpecialTokenIds, world: World) -> Validation | None:
    if "validation" not in corpus.manifest["splits"]:
        return None
    held_out = world.run_and_sync_errors(lambda: Corpus(config.data.path, "validation"))
    layout = config.make_layout(specials, corpus.views, validating=True)
    return world.run_and_sync_errors(
        lambda: Validation(
            held_out,
            layout,
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
