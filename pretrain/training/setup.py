"""From a configuration to a Trainer: cheap checks first, the model last."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

from data_prep.console import UserError, print_now
from data_prep.files import try_lock
from pretrain.config import RunConfig
from pretrain.data.corpus import Corpus
from pretrain.data.layout import Layout, Specials, make_layout
from pretrain.data.loader import Loader
from pretrain.models.language_model import LanguageModel, special_ids
from pretrain.objectives import make_objective
from pretrain.run_folder import MODEL, list_steps, read_status, write_status
from pretrain.training import checkpoint
from pretrain.training.background import evaluations_asked_for, start_evaluations
from pretrain.training.describe import describe_run
from pretrain.training.distributed import World
from pretrain.training.engine import build_engine, engine_settings, parameter_count
from pretrain.training.loop import StopRequest, Trainer
from pretrain.training.metrics import Metrics
from pretrain.training.throughput import Throughput, count_parameters
from pretrain.training.validation import Validation


def set_up(config: RunConfig, world: World) -> Trainer | None:
    """Build the run, resumed where a checkpoint stands; None where it is finished already. Raises UserError."""
    say = print_now if world.is_main else lambda text: None
    engine_settings(config, world.size)
    corpus = world.agree(lambda: Corpus(config.data.path, "train"))
    world.agree(lambda: check(config, corpus))
    lock = world.agree(lambda: _claim(config.run_dir) if world.is_main else None)
    world.agree(lambda: describe_run(config, corpus.manifest, world.size) if world.is_main else None)
    checkpoints = config.run_dir / "checkpoints"
    if list_steps(checkpoints) and read_status(config.run_dir).get("status") == "finished":
        say(f"{config.run_dir} is finished already")
        _resume_evaluations(config, world)
        return None
    stop = StopRequest()
    if config.resting_keys():
        say(f"note: with objective.name=next_token these keys of objective rest: {', '.join(config.resting_keys())}")

    objective = make_objective(config.objective)
    engine = world.agree(lambda: build_engine(config, corpus.tokenizer, objective, world))
    model = engine.module.model
    specials = special_ids(corpus.tokenizer, model.vocabulary)
    layout = run_layout(config, specials, pairs=config.objective.has_pairs)
    trainer = Trainer(
        config=config, world=world, engine=engine, specials=specials, weights=dict(objective.weights), stop=stop, lock=lock,
        loader=Loader(corpus, layout, config.data.sequence_length, config.seed,
                      dropout=config.objective.dropout, epochs=config.train.epochs),
        throughput=Throughput(count_parameters(model), world.size, config.data.sequence_length),
        validation=_validation(config, corpus, specials, world),
    )
    say(f"{parameter_count(model):,} parameters, {len(corpus):,} records, {world.size} rank{'s' * (world.size > 1)} on {world.device.type}")
    if trainer.validation is None:
        say("note: the corpus has no validation split, so nothing is validated")
    _resume(trainer, say)
    if world.is_main:
        _write_skeleton(config, model, corpus)
        trainer.metrics = Metrics(config.run_dir, trainer.progress.step, config.monitor.tensorboard)
        write_status(config.run_dir, "running", trainer.progress.step)
    _resume_evaluations(config, world)
    return trainer


def _resume_evaluations(config: RunConfig, world: World) -> None:
    """Start the evaluations that a killed run or job left to do."""
    if world.is_main and evaluations_asked_for(config.run_dir):
        start_evaluations(config.run_dir)


def _claim(run_dir: Path) -> IO[bytes]:
    """Keep a second run out of the folder, as long as this process lives."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = try_lock(run_dir / ".lock")
    except OSError as error:
        raise UserError(f"cannot write to {run_dir} (output_dir/name): {error.strerror}") from None
    if lock is None:
        raise UserError(f"another run is going on in {run_dir}; wait for it, or choose another `name`")
    return lock


def check(config: RunConfig, corpus: Corpus | None) -> None:
    """Mistakes that can be seen before a model is built, and, without a corpus, before there are any shards."""
    length = config.data.sequence_length
    if corpus is not None and corpus.positions_needed > length:
        raise UserError(f"data.sequence_length is {length}, too short for the records of {config.data.path}: the longest needs "
                        f"{corpus.positions_needed} positions; raise it, or prepare the corpus again with this length, which drops and counts them")
    for task in config.evaluation.tasks:
        for key, path in (("train", task.train), ("test", task.test)):
            if path is not None and not Path(path).is_file():
                raise UserError(f"evaluation.tasks: there is no file {path} ({key} of {task.name})")
    steps = list_steps(config.run_dir / "checkpoints")
    if config.checkpoint.resume == "never" and steps:
        raise UserError(f"checkpoint.resume is never, but {config.run_dir} holds checkpoints up to step {steps[-1]}; "
                        "choose another `name`, or remove that folder")
    if config.checkpoint.resume == "must" and not steps:
        raise UserError(f"checkpoint.resume is must, but {config.run_dir} holds no checkpoint")


def run_layout(config: RunConfig, specials: Specials, pairs: bool) -> Layout:
    """The layout of the run's records, with or without what only the pair loss needs."""
    return make_layout(config.objective.layout, specials, pairs=pairs, predictor_tokens=config.predictor_tokens, lm_views=config.data.lm_views)


def _validation(config: RunConfig, corpus: Corpus, specials: Specials, world: World) -> Validation | None:
    if "validation" not in corpus.manifest["splits"]:
        return None
    held_out = world.agree(lambda: Corpus(config.data.path, "validation"))
    # with pairs whatever the objective: the monitors are there for next_token too
    return Validation(held_out, run_layout(config, specials, pairs=True), specials, config.data.sequence_length,
                      config.monitor.validation_records, config.train.micro_batch_rows, world)


def _resume(trainer: Trainer, say: Callable[[str], None]) -> None:
    state = checkpoint.load_newest(trainer.engine, trainer.config.run_dir / "checkpoints", trainer.world, say)
    if state:
        trainer.resume(state)
        say(f"going on from step {trainer.progress.step}")


def _write_skeleton(config: RunConfig, model: LanguageModel, corpus: Corpus) -> None:
    """Everything of an export but the weights: the configuration of the model, and its tokenizer."""
    folder = config.run_dir / MODEL
    if folder.exists():
        return
    temporary = folder.with_name(f".{MODEL}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(corpus.folder / "tokenizer", temporary)
    model.causal_lm.config.save_pretrained(temporary)
    os.replace(temporary, folder)
