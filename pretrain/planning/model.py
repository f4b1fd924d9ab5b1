"""The model of a run: its Hugging Face configuration, and the model without values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights

from data_prep.tokenizer import Tokenizer
from data_prep.utils.console import UserError
from pretrain.config import RunConfig
from pretrain.models.attention import resolve_attention
from pretrain.models.language_model import LanguageModel, build_model_config, pretrained_config, random_causal_lm
from pretrain.models.model_check import check_model
from pretrain.models.stored_weights import check_stored_weights
from pretrain.run_folder import MODEL_DIR, list_steps


def resolve_hf_config(config: RunConfig, tokenizer: Tokenizer, resuming: bool) -> PretrainedConfig:
    """Return the model's Hugging Face configuration: from its family and shape, or from the folder of model.init_from.

    A resumed run has a copy of the configuration in that folder, and no longer needs the folder. Raises UserError, also
    if a tiny model of the same structure shows that the model does not suit packed rows.
    """
    model = config.model
    if model.init_from is None:
        assert model.family is not None and model.shape is not None  # the configuration has either these or init_from
        hf_config = build_model_config(model.family, model.shape, tokenizer, config.data.sequence_length)
        check_model(hf_config, model.attention, "model.family")
        return hf_config
    copied = resuming and (config.run_dir / MODEL_DIR).exists()
    hf_config = pretrained_config(config.run_dir / MODEL_DIR if copied else model.init_from)
    check_model(hf_config, model.attention, "model.init_from")
    if not copied:
        check_stored_weights(model.init_from, hf_config)
    return hf_config


def check_model_fits_corpus(config: RunConfig, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Raise UserError if the model in the folder model.init_from is too small for the corpus."""
    if model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the model in model.init_from has {model.vocab_size} token embeddings, but the corpus uses "
            f"{tokenizer.vocab_size} ids: prepare the corpus with data.tokenizer.path set to {config.model.init_from}"
        )
    limit = model.max_positions
    if limit < config.data.sequence_length:
        raise UserError(
            f"data.sequence_length is {config.data.sequence_length}, but the model in model.init_from allows {limit} "
            "positions: lower data.sequence_length"
        )


class EmptyOnMeta(TorchFunctionMode):
    """A mode in which `torch.empty` creates tensors on the meta device unless it is passed another one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def without_values() -> Iterator[None]:
    """Create weights on the meta device and initialise nothing.

    `torch.device("meta")` would apply to `torch.arange` too. On the meta device, torch computes its shape in Python and
    imports sympy.
    """
    with EmptyOnMeta(), no_init_weights():
        yield


def meta_model(config: RunConfig, tokenizer: Tokenizer) -> LanguageModel:
    """Return the model with its weights on the meta device. Raises UserError if it does not fit the corpus."""
    attention = "eager"  # supported by every family; nothing is computed
    shape = resolve_hf_config(config, tokenizer, resuming=bool(list_steps(config.run_dir / "checkpoints")))
    if config.model.init_from is None:
        resolve_attention(
            config.model.attention, torch.device("cuda"), shape
        )  # rejects settings that no device supports
    with without_values():
        causal_lm = random_causal_lm(shape, attention, torch.float32)
        causal_lm.tie_weights()  # a part of the initialisation
        model = LanguageModel(causal_lm, config.predictor_tokens, attention)
    if config.model.init_from is not None:
        check_model_fits_corpus(config, model, tokenizer)
    return model
