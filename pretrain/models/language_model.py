"""A wrapper of causal language models from transformers that computes hidden states and head separately."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.activations import ACT2FN

from data_prep.layout import SpecialTokenIds
from data_prep.tokenizer import Tokenizer
from data_prep.utils.config_file import similar_key
from data_prep.utils.console import UserError
from data_prep.utils.files import read_json_or_none
from pretrain.data.batch import Batch
from pretrain.models.attention import Mask, attention_mask
from pretrain.models.families import family_names, register_family, register_family_from_folder
from pretrain.models.head import Head
from pretrain.models.structure import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    attention_dropout,
    decoder_layers,
    layer_types,
    logit_scale,
    max_positions,
    rope_types,
)
from pretrain.objectives.base import ModelShape

VOCAB_SIZE_MULTIPLE = 64
"""Multiple to which the vocabulary is padded before the model is built; it is never resized."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies depend on the configuration alone.

With the other RoPE types of transformers, the frequencies depend on the longest position of the batch, so packed rows
would not equal separate sequences.
"""
STATEFUL_LAYERS = {"linear_attention", "conv", "hybrid"}
"""Layer types of transformers that carry a state from token to token, which no mask resets."""
DEFAULT_INITIALIZER_RANGE = 0.02
"""Standard deviation of the predictor embedding if the configuration of the model has no initializer_range."""


def padded_vocab_size(tokenizer: Tokenizer) -> int:
    """Return the number of rows of the embedding: the tokenizer's vocabulary size, rounded up."""
    return -(-tokenizer.vocab_size // VOCAB_SIZE_MULTIPLE) * VOCAB_SIZE_MULTIPLE


def special_ids(tokenizer: Tokenizer, vocab_size: int) -> SpecialTokenIds:
    """Return the special token ids of a layout; the ids of predictor tokens start at `vocab_size`."""
    return SpecialTokenIds(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.sep_id, vocab_size)


def build_model_config(
    family: str, shape: dict[str, Any], tokenizer: Tokenizer, sequence_length: int
) -> PretrainedConfig:
    """Return the Hugging Face configuration of a family and shape for a tokenizer.

    Raises UserError for an unknown family, for a key that the family does not have, and for values from which no model
    can be built.
    """
    if family not in family_names():
        nearest = similar_key(family, family_names())
        raise UserError(
            f"model.family: unknown family {family!r}; "
            + (f"the nearest known one is {nearest!r}" if nearest else "docs/models.md lists the known ones")
        )
    register_family(family)
    computed = {
        "vocab_size": padded_vocab_size(tokenizer),
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    try:
        default = AutoConfig.for_model(family)
    except Exception as error:  # as below
        raise UserError(f"model.family: cannot create a configuration of {family}: {one_line(error)}") from None
    check_kind(default, f"model.family: {family}")
    # The options that every PretrainedConfig has do not describe the shape.
    shape_keys = default.to_dict().keys() - PretrainedConfig().to_dict().keys()
    for key in shape:
        if key in computed:
            raise UserError(f"model.shape: {key} comes from the tokenizer; remove it")
        if key not in shape_keys:
            raise UserError(f"model.shape: {family} has no option {key!r}")
    position_key = default.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    positions = {position_key: sequence_length} if position_key in shape_keys else {}
    try:
        config = AutoConfig.for_model(family, **(positions | shape | computed))
    except Exception as error:  # the validation of transformers raises its own exception types
        raise UserError(f"model.shape: {family} cannot be built with these values: {one_line(error)}") from None
    for key, value in shape.items():
        if isinstance(value, int | float | str) and getattr(config, key, None) != value:
            raise UserError(
                f"model.shape: {family} ignores {key} with these values: it is {getattr(config, key, None)!r}, not "
                f"{value!r}; remove it, or set the option that it depends on"
            )
    check_shape(config, "model.shape")
    if max_positions(config) < sequence_length:
        raise UserError(
            f"data.sequence_length is {sequence_length}, but the model shape allows {max_positions(config)} "
            f"positions; lower data.sequence_length, or raise {position_key}"
        )
    return config


def check_kind(config: PretrainedConfig, where: str) -> None:
    """Raise UserError for a model that is not a single decoder. The message begins with `where`."""
    if config.sub_configs:
        text = getattr(config, "text_config", None)
        remedy = f"use its text model, {text.model_type}" if text is not None else "choose a different family"
        raise UserError(f"{where} is a model of several parts ({', '.join(config.sub_configs)}); {remedy}")
    if config.is_encoder_decoder:
        raise UserError(f"{where} is the decoder of an encoder-decoder model; choose a different family")
    if config.is_heterogeneous:
        raise UserError(f"{where} has layers of different sizes (per_layer_config); choose a different family")


def check_shape(config: PretrainedConfig, where: str) -> None:
    """Raise UserError for a configuration from which no causal model of packed rows can be built.

    Only values that the validation of the configuration's class accepts are checked. The message begins with `where`.
    """
    for name in ("hidden_act", "hidden_activation"):
        if getattr(config, name, "silu") not in ACT2FN:
            raise UserError(f"{where}: unknown {name} {getattr(config, name)!r}; choose one that transformers supports")
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "query_pre_attn_scalar",
    ):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value < 1:
            raise UserError(f"{where}: {name} must be positive, not {value}")
    if not 0 <= attention_dropout(config) < 1:
        raise UserError(f"{where}: attention_dropout must be at least 0 and below 1, not {attention_dropout(config)}")
    heads, key_value_heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads and key_value_heads and heads % key_value_heads:
        raise UserError(
            f"{where}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({key_value_heads})"
        )
    if unknown := rope_types(config) - set(ROPE_TYPES):
        raise UserError(f"{where}: rope_type must be one of {', '.join(ROPE_TYPES)}, not {', '.join(sorted(unknown))}")
    if unknown := layer_types(config) - {FULL_ATTENTION, SLIDING_ATTENTION}:
        stateful = sorted(unknown & STATEFUL_LAYERS)
        raise UserError(
            f"{where}: layer_types must be {FULL_ATTENTION} or {SLIDING_ATTENTION}, not {', '.join(sorted(unknown))}"
            + (f": layers of {stateful[0]} carry a state from record to record in a row" if stateful else "")
        )
    if SLIDING_ATTENTION in layer_types(config) and (config.sliding_window or 0) < 1:
        raise UserError(
            f"{where}: {config.model_type} has layers of sliding attention: sliding_window must be positive"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError(f"{where}: use_bidirectional_attention lets a token see the token that it predicts; remove it")


class PredictorEmbedding(nn.Embedding):
    """Embeddings (k, D) of the predictor tokens, initialised and scaled like the family's token embeddings.

    Gemma multiplies its token embeddings by sqrt(D). Without the same factor the predictor tokens would be small in
    comparison, and learn more slowly.
    """

    def __init__(self, tokens: int, config: PretrainedConfig, token_embedding: nn.Embedding):
        super().__init__(tokens, config.hidden_size, dtype=token_embedding.weight.dtype)
        self.scale = getattr(token_embedding, "scalar_embed_scale", 1.0)
        nn.init.normal_(self.weight, std=getattr(config, "initializer_range", DEFAULT_INITIALIZER_RANGE))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """Return the scaled embeddings of predictor tokens: indices (...) from 0 to k - 1 -> (..., D)."""
        # With one predictor token, the backward pass of a lookup would sort one equal index per position.
        if self.num_embeddings == 1:
            return self.weight[0].expand(*index.shape, -1) * self.scale
        return super().forward(index) * self.scale


class LanguageModel(nn.Module):
    """A causal language model on packed rows of several encodings, with k predictor tokens outside its vocabulary.

    The predictor tokens have a separate embedding. They are therefore not in the output layer and not trained through
    it. Every module is called exactly once per forward pass for any batch, because ZeRO-3 requires this.
    """

    causal_lm: Any
    """A PreTrainedModel; typed as Any because its attributes depend on the family."""
    vocab_size: int
    hidden_size: int

    def __init__(self, causal_lm: Any, predictor_tokens: int, attention: str):
        super().__init__()
        self.causal_lm, self.attention = causal_lm, attention
        config = causal_lm.config
        causal_lm.set_output_embeddings(
            Head(
                causal_lm.get_output_embeddings(),
                getattr(config, "final_logit_softcapping", None),
                scale=logit_scale(config),
            )
        )
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        token_embedding = causal_lm.get_input_embeddings()
        self.predictor = PredictorEmbedding(predictor_tokens, config, token_embedding) if predictor_tokens else None

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the last-layer hidden states after the final norm, (B * L, D)."""
        hidden = self.transformer(
            inputs_embeds=self.embed(batch.token_ids),
            attention_mask=self.mask(batch),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        return hidden.flatten(0, 1)

    def mask(self, batch: Batch) -> Mask | dict[str, Mask]:
        """Return the attention mask of a batch in the format of the model's attention kernel."""
        return attention_mask(
            batch.visible_until, batch.positions, self.attention, self.causal_lm.config, self.causal_lm.dtype
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the next-token logits: (M, D) -> (M, V)."""
        return self.head.finish(self.head(hidden))

    def cross_entropy(self, hidden: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        """Return the sum of the cross-entropies of the next tokens, in nats: (M, D), (M,) -> scalar."""
        return self.head(hidden, label_ids)

    @property
    def head_sums(self) -> torch.Tensor:
        """Sums over the labels of the last cross-entropy; see `Head.sums`."""
        if self.head.sums is None:
            raise RuntimeError("the head measures neither the z-loss nor the logits")
        return self.head.sums

    def kl_divergence(self, hidden: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Return the sum of KL(p || q) in nats, with the next-token distributions p of `reference` and q of `hidden`.

        Both are (M, D). The gradient flows into `hidden` only, not into the head.
        """
        return self.head(hidden, reference=reference)

    @property
    def transformer(self) -> Any:
        """The model without its output head."""
        return self.causal_lm.base_model

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the transformer."""
        return decoder_layers(self.causal_lm)

    @property
    def head(self) -> Head:
        """The output head."""
        head: Head = self.causal_lm.get_output_embeddings()
        return head

    @property
    def max_positions(self) -> float:
        """Largest number of positions of a sequence."""
        return max_positions(self.causal_lm.config)

    @property
    def shape(self) -> ModelShape:
        """The sizes that an objective with weights needs."""
        return ModelShape(self.hidden_size, self.causal_lm.config.num_hidden_layers)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.causal_lm.device

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the input embeddings, (B, L) -> (B, L, D); ids from the vocabulary size on are predictor tokens."""
        embedded = self.causal_lm.get_input_embeddings()(token_ids.clamp(max=self.vocab_size - 1))
        if self.predictor is None:
            return embedded
        predicting = token_ids >= self.vocab_size
        predictor = self.predictor((token_ids - self.vocab_size).clamp(min=0))
        return torch.where(predicting[..., None], predictor.to(embedded.dtype), embedded)


def random_causal_lm(config: PretrainedConfig, attention: str, dtype: torch.dtype) -> Any:
    """Return a PreTrainedModel with the family's own random initialisation, from torch's generator.

    It uses `from_config` rather than the constructor: under ZeRO-3 `from_config` gathers every parameter before
    initialising it, so the weights are the same on any number of ranks.
    """
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def pretrained_config(folder: str | Path) -> PretrainedConfig:
    """Return the configuration of a local Hugging Face folder.

    Raises UserError if it does not load, brings its own code, is not a causal language model, or has a shape that
    `model.shape` would not allow.
    """
    register_family_from_folder(folder)
    where = f"model.init_from: {Path(folder) / 'config.json'}"
    if "auto_map" in (read_json_or_none(Path(folder) / "config.json") or {}):
        raise UserError(
            f"{where} refers to code outside transformers (auto_map), which is never run; remove auto_map to use the "
            "class of transformers, if it has one"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the validation of transformers raises its own exception types
        raise UserError(f"model.init_from: cannot load {folder}: {one_line(error)}") from None
    if config.model_type not in family_names():
        raise UserError(
            f"model.init_from: {folder} has a model of the family {config.model_type!r}, which has no causal language "
            "model; docs/models.md lists the families"
        )
    check_kind(config, f"{where}: {config.model_type}")
    check_shape(config, where)
    return config


def one_line(error: Exception) -> str:
    """Return the message of an exception of transformers on one line, at most 300 characters long."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def pretrained_causal_lm(folder: str, attention: str, dtype: torch.dtype) -> nn.Module:
    """Return the model of a local Hugging Face folder with its weights. Raises UserError if it does not load."""
    register_family_from_folder(folder)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=attention, dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.init_from: cannot load {folder}: {one_line(error)}") from None
