"""A step of a run, repeated in one process without DeepSpeed, ranks or micro batches."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.config import load_config
from pretrain.data.batch import Batch, assemble
from pretrain.data.corpus import Corpus
from pretrain.data.loader import Loader, Rows, loss_denominators
from pretrain.models.attention import resolve_attention
from pretrain.models.language_model import LanguageModel, build_model_config, random_causal_lm, special_ids
from pretrain.objectives.base import build_objective
from pretrain.objectives.pool import Gather
from pretrain.run_folder import step_name
from pretrain.training.checkpoint_loading import consolidate
from pretrain.training.engine import TrainingModule


@dataclass
class PlainStep:
    """The model before a step, and the global batch of the step."""

    module: TrainingModule
    rows: Rows
    batch: Batch
    counts: dict[str, int]
    """Count of each term of the objective."""


def plain_third_step(folder: Path, name: str) -> PlainStep:
    """Return the third step of a run with eight rows per step, with the weights of its checkpoint of the second."""
    config = load_config(folder / f"{name}.yaml")
    corpus = Corpus(config.data.path, "train")
    family = config.model.family
    shape = build_model_config(family, config.model.shape, corpus.tokenizer, config.data.sequence_length)
    attention = resolve_attention("auto", torch.device("cpu"), shape)
    model = LanguageModel(random_causal_lm(shape, attention, torch.float32), config.predictor_tokens, attention)
    objective = build_objective(config.objective, model.shape)
    module = TrainingModule(model, objective, Gather(lambda tensor: tensor, 0))
    state = consolidate(folder / "runs" / name / "checkpoints" / step_name(2))
    keys = module.load_state_dict(
        {key if key.startswith("objective.") else f"model.{key}": value for key, value in state.items()}, strict=False
    )
    assert set(keys.missing_keys) <= {"model.causal_lm.lm_head.weight"} and not keys.unexpected_keys
    specials = special_ids(corpus.tokenizer, model.vocab_size)
    layout = config.make_layout(specials, corpus.views)
    loader = Loader(corpus, layout, config.data.sequence_length, config.seed, dropout=0.0, epochs=None)
    rows = [loader.next_rows(8) for _ in range(3)][-1]
    batch = assemble(rows, corpus, layout, specials, config.data.sequence_length, int(rows.paired.sum()))
    return PlainStep(module, rows, batch, loss_denominators(rows, layout, objective.units))
