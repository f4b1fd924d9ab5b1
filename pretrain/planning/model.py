"""The model of a run: its Hugging Face configuration, and the model without values."""

import torch
from transformers import PretrainedConfig

from data_prep.tokenizer import Tokenizer
from data_prep.utils.console import UserError
from pretrain.config import RunConfig
from pretrain.models.attention import resolve_attention
from pretrain.models.language_model import LanguageModel, build_model_config, pretrained_config, random_causal_lm
from pretrain.models.stored_weights import check_stored_weights
from pretrain.run_folder import MODEL_DIR, list_steps


def resolve_hf_config(config: RunConfig, tokenizer: Tokenizer, resuming: bool) -> PretrainedConfig:
    """Return the model's Hugging Face configuration: from its family and shape, or from the folder of model.init_from.

    A resumed run has a copy of the configuration in that folder, and no longer needs the folder. Raises UserError.
    """
    model = config.model
    if model.init_from is not None and resuming and (config.run_dir / MODEL_DIR).exists():
        return pretrained_config(config.run_dir / MODEL_DIR)
    if model.init_from is not None:
        hf_config = pretrained_config(model.init_from)
        check_stored_weights(model.init_from, hf_config)
        return hf_config
    assert model.family is not None and model.shape is not None  # the configuration has either these or init_from
    return build_model_config(model.family, model.shape, tokenizer, config.data.sequence_length)


def check_model_fits_corpus(config: RunConfig, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Raise UserError if the model in the folder model.init_from is too small for the corpus."""
    if model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the model in model.init_from has {model.vocab_size} token embeddings, but the corpus uses "
            f"{tokenizer.vocab_size} ids: prepare the corpus with data.tokenizer.path set to {config.model.init_from}"
        )
    limit = model.causal_lm.config.max_position_embeddings
    if limit < config.data.sequence_length:
        raise UserError(
            f"data.sequence_length is {config.data.sequence_length}, but the model in model.init_from allows {limit} "
            "positions: lower data.sequence_length"
        )


def meta_model(config: RunConfig, tokenizer: Tokenizer) -> LanguageModel:
    """Return the model on the meta device. Raises UserError if it does not fit the corpus."""
    attention = "eager"  # supported by every family; nothing is computed
    shape = resolve_hf_config(config, tokenizer, resuming=bool(list_steps(config.run_dir / "checkpoints")))
    if config.model.init_from is None:
        resolve_attention(
            config.model.attention, torch.device("cuda"), shape
        )  # rejects settings that no device supports
        with torch.device("meta"):
            return LanguageModel(random_causal_lm(shape, attention, torch.float32), config.predictor_tokens, attention)
    with torch.device("meta"):
        model = LanguageModel(random_causal_lm(shape, attention, torch.float32), config.predictor_tokens, attention)
    check_model_fits_corpus(config, model, tokenizer)
    return model
