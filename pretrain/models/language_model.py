"""A causal language model from transformers, opened up: hidden states of packed rows, and the head apart."""

from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.activations import ACT2FN

from data_prep.console import UserError
from data_prep.tokenizer import Tokenizer
from pretrain.data.batch import Batch
from pretrain.data.layout import SpecialTokenIds
from pretrain.models.attention import FULL_ATTENTION, SLIDING_ATTENTION, Mask, attention_mask
from pretrain.models.families import register_family, register_family_from_folder
from pretrain.models.head import Head
from pretrain.sections import Family

VOCAB_SIZE_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this before the model is built; it is never resized."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies depend on the configuration alone. The others of transformers look at the longest position of
the batch: packed rows would not equal separate sequences."""


def padded_vocab_size(tokenizer: Tokenizer) -> int:
    """Rows of the embedding: the tokenizer's ids, rounded up."""
    return -(-tokenizer.vocab_size // VOCAB_SIZE_MULTIPLE) * VOCAB_SIZE_MULTIPLE


def special_ids(tokenizer: Tokenizer, vocab_size: int) -> SpecialTokenIds:
    """The ids that a layout puts in; predictor tokens stand beyond the model's vocabulary."""
    return SpecialTokenIds(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.sep_id, vocab_size)


def build_model_config(
    family: str, shape: dict[str, Any], tokenizer: Tokenizer, sequence_length: int
) -> PretrainedConfig:
    """The Hugging Face configuration of a family and shape for a tokenizer.

    Raises UserError for a key that the family does not have.
    """
    register_family(family)
    computed = {
        "vocab_size": padded_vocab_size(tokenizer),
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    known = (
        AutoConfig.for_model(family).to_dict().keys() - PretrainedConfig().to_dict().keys()
    )  # without what is no shape
    for key in shape:
        if key in computed:
            raise UserError(f"model.shape: {key} comes from the tokenizer; leave it out")
        if key not in known:
            raise UserError(f"model.shape: {family} has no option {key!r}")
    try:
        config = AutoConfig.for_model(family, **({"max_position_embeddings": sequence_length} | shape | computed))
    except Exception as error:  # its validation raises kinds of its own
        raise UserError(f"model.shape: {family} cannot be built so: {' '.join(str(error).split())[:300]}") from None
    _check_shape(config, "model.shape")
    if config.max_position_embeddings < sequence_length:
        raise UserError(
            f"data.sequence_length is {sequence_length}, but the model shape allows {config.max_position_embeddings} positions"
        )
    return config


def _check_shape(config: PretrainedConfig, where: str) -> None:
    """Raise UserError, which begins with `where`, for what its class lets pass though no causal model of packed rows can be built from it."""
    for name in ("hidden_act", "hidden_activation"):
        if getattr(config, name, "silu") not in ACT2FN:
            raise UserError(f"{where}: transformers knows no {name} {getattr(config, name)!r}")
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "query_pre_attn_scalar",
    ):
        if getattr(config, name, 1) < 1:
            raise UserError(f"{where}: {name} must be positive, not {getattr(config, name)}")
    if not 0 <= config.attention_dropout < 1:
        raise UserError(f"{where}: attention_dropout is a share below 1, not {config.attention_dropout}")
    heads, key_value_heads = (getattr(config, name, 1) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads % key_value_heads:
        raise UserError(
            f"{where}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({key_value_heads})"
        )
    if config.rope_parameters["rope_type"] not in ROPE_TYPES:
        raise UserError(
            f"{where}: rope_type is one of {', '.join(ROPE_TYPES)}, not {config.rope_parameters['rope_type']}"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {FULL_ATTENTION, SLIDING_ATTENTION}:
        raise UserError(
            f"{where}: layer_types are {FULL_ATTENTION} and {SLIDING_ATTENTION}, not {', '.join(sorted(kinds - {FULL_ATTENTION, SLIDING_ATTENTION}))}"
        )
    if SLIDING_ATTENTION in kinds and (config.sliding_window or 0) < 1:
        raise UserError(
            f"{where}: {config.model_type} has layers of sliding attention: sliding_window must be positive"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError(f"{where}: use_bidirectional_attention lets a token see the one that it predicts; leave it out")


class PredictorEmbedding(nn.Embedding):
    """Embeddings (k, D) of the predictor tokens, initialised and scaled like the family's word embeddings.

    Gemma multiplies its word embeddings by sqrt(D) on the way in; without the same factor predictor tokens would be
    drowned by them, and learn more slowly.
    """

    def __init__(self, tokens: int, config: PretrainedConfig, words: nn.Embedding):
        super().__init__(tokens, config.hidden_size, dtype=words.weight.dtype)
        self.scale = getattr(words, "scalar_embed_scale", 1.0)
        nn.init.normal_(self.weight, std=config.initializer_range)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """(...) in 0 to k - 1 -> (..., D)."""
        if (
            self.num_embeddings == 1
        ):  # the backward pass of a lookup would sort as many equal indices as there are positions
            return self.weight[0].expand(*index.shape, -1) * self.scale
        return super().forward(index) * self.scale


class LanguageModel(nn.Module):
    """A causal language model whose rows hold several encodings, and k predictor tokens outside its vocabulary.

    The predictor tokens have an embedding of their own, so that they neither stand in the output layer nor are
    trained through it. Every module is called once a forward pass whatever the batch holds, as ZeRO-3 needs.
    """

    causal_lm: Any
    """A PreTrainedModel. Its attributes (`model`, `lm_head`, `config`) depend on the family, so the type checker knows none of them."""
    vocab_size: int
    hidden_size: int

    def __init__(self, causal_lm: Any, predictor_tokens: int, attention: str):
        super().__init__()
        self.causal_lm, self.attention = causal_lm, attention
        config = causal_lm.config
        causal_lm.lm_head = Head(causal_lm.lm_head, getattr(config, "final_logit_softcapping", None))
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        words = causal_lm.get_input_embeddings()
        self.predictor = PredictorEmbedding(predictor_tokens, config, words) if predictor_tokens else None

    def forward(self, batch: Batch) -> torch.Tensor:
        """Last-layer hidden states after the final norm, (B * L, D)."""
        hidden = self.causal_lm.model(
            inputs_embeds=self.embed(batch.token_ids),
            attention_mask=self.mask(batch),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        return hidden.flatten(0, 1)

    def mask(self, batch: Batch) -> Mask | dict[str, Mask]:
        """What each token may see, as the model's attention wants it."""
        return attention_mask(
            batch.visible_until, batch.positions, self.attention, self.causal_lm.config, self.causal_lm.dtype
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits: (M, D) -> (M, V)."""
        return self.causal_lm.lm_head.apply_softcap(self.causal_lm.lm_head(hidden))

    def cross_entropy(self, hidden: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        """Sum of the cross-entropies of the next tokens, in nats: (M, D), (M,) -> scalar."""
        return self.causal_lm.lm_head(hidden, label_ids)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.causal_lm.device

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """What goes into the first layer, for ids of the vocabulary and, beyond it, of predictor tokens: (B, L) -> (B, L, D)."""
        embedded = self.causal_lm.get_input_embeddings()(token_ids.clamp(max=self.vocab_size - 1))
        if self.predictor is None:
            return embedded
        predicting = token_ids >= self.vocab_size
        predictor = self.predictor((token_ids - self.vocab_size).clamp(min=0))
        return torch.where(predicting[..., None], predictor.to(embedded.dtype), embedded)


def random_causal_lm(config: PretrainedConfig, attention: str, dtype: torch.dtype) -> nn.Module:
    """The family's own initialisation, from torch's generator.

    `from_config`, not the constructor: under ZeRO-3 it gathers every parameter before initialising it, so the weights are the same on any
    number of ranks.
    """
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def pretrained_config(folder: str | Path) -> PretrainedConfig:
    """Return the configuration of a local Hugging Face folder.

    Raises UserError if it does not load, is of an unknown family, or has a shape that `model.shape` could not have either.
    """
    register_family_from_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its validation raises kinds of its own
        raise UserError(f"model.init_from: cannot load {folder}: {' '.join(str(error).split())[:300]}") from None
    if config.model_type not in get_args(Family):
        raise UserError(
            f"model.init_from: {folder} holds a model of the family {config.model_type!r}; known ones: {', '.join(get_args(Family))}"
        )
    _check_shape(config, f"model.init_from: {Path(folder) / 'config.json'}")
    return config


def pretrained_causal_lm(folder: str, attention: str, dtype: torch.dtype) -> nn.Module:
    """The weights of a local Hugging Face folder. Raises UserError where it does not load."""
    register_family_from_folder(folder)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=attention, dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.init_from: cannot load {folder}: {' '.join(str(error).split())[:300]}") from None
