"""OpenELM (Mehta et al., arXiv 2404.14619) as a transformers model, because transformers does not include it.

Layer-wise scaling (section 2.1): the number of heads and the width of the feed-forward network grow from the first
layer to the last, so the layers have different shapes. Everything else is a Llama with RMSNorm on the queries and keys
of each head. The initialisation is taken from Apple's CoreNet, the code that trained OpenELM (github.com/apple/corenet,
corenet/modeling/models/language_modeling/general_gpt.py).

Importing this module registers the family: after `import pretrain.models.openelm`,
`AutoModelForCausalLM.from_pretrained` loads a folder that `save_pretrained` or an export wrote. `trust_remote_code` is
not needed.
"""

from collections.abc import Callable

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


@strict
class OpenELMConfig(PreTrainedConfig):
    """Shape of an OpenELM model; the defaults are the 270M model.

    Common fields are named as in transformers, and the fields of layer-wise scaling as in Apple's code.
    """

    model_type = "openelm"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 1280
    num_hidden_layers: int = 16
    head_dim: int = 64
    qkv_multipliers: list[int | float] | tuple[int | float, ...] = (0.5, 1.0)
    """Total width of the query heads in the first and last layer, as a multiple of hidden_size (the paper's alpha)."""
    num_gqa_groups: int = 4
    """Number of query heads that share a key/value head."""
    ffn_multipliers: list[int | float] | tuple[int | float, ...] = (0.5, 4.0)
    """Feed-forward width in the first and last layer, as a multiple of hidden_size (the paper's beta)."""
    ffn_dim_divisor: int = 256
    """Divisor of the width of the feed-forward network."""
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    attention_dropout: int | float = 0.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def validate_architecture(self) -> None:
        """Raise ValueError for an invalid shape; called by the validation of transformers."""
        for name in ("qkv_multipliers", "ffn_multipliers"):
            multipliers = getattr(self, name)
            if len(multipliers) != 2 or min(multipliers) <= 0:
                raise ValueError(
                    f"{name} must be two positive numbers, for the first and the last layer, not {list(multipliers)}"
                )
        for name in ("hidden_size", "num_hidden_layers", "head_dim", "num_gqa_groups", "ffn_dim_divisor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    @property
    def query_heads(self) -> list[int]:
        """Number of query heads in each layer."""
        divisor = self.head_dim * self.num_gqa_groups
        return [
            make_divisible(self.hidden_size * multiplier, divisor) // self.head_dim
            for multiplier in self._by_layer(self.qkv_multipliers)
        ]

    @property
    def key_value_heads(self) -> list[int]:
        """Number of key/value heads in each layer."""
        return [heads // self.num_gqa_groups for heads in self.query_heads]

    @property
    def ffn_widths(self) -> list[int]:
        """Width of the feed-forward network of each layer."""
        return [
            make_divisible(self.hidden_size * multiplier, self.ffn_dim_divisor)
            for multiplier in self._by_layer(self.ffn_multipliers)
        ]

    @property
    def initializer_range(self) -> float:
        """Standard deviation of the embeddings."""
        return self.hidden_size**-0.5

    def _by_layer(self, multipliers: list[float] | tuple[float, ...]) -> list[float]:
        """Return the multiplier of each layer, in equal steps from the first to the last.

        The multipliers are rounded to two digits as in CoreNet; otherwise the widths differ from the published widths.
        """
        first, last = multipliers
        return [round(float(multiplier), 2) for multiplier in np.linspace(first, last, num=self.num_hidden_layers)]


def make_divisible(value: float, divisor: int) -> int:
    """Return the multiple of `divisor` nearest to `value`, or the next one if that is below 90% of `value`; never 0."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


class ResidualProjection(nn.Linear):
    """A projection whose output is added to the residual stream; it is initialised with smaller weights."""


class OpenELMAttention(nn.Module):
    """Grouped-query attention with RMSNorm on the queries and keys of each head, before RoPE."""

    def __init__(self, config: OpenELMConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        query_width, key_value_width = (
            heads[layer_idx] * config.head_dim for heads in (config.query_heads, config.key_value_heads)
        )
        self.num_key_value_groups = config.num_gqa_groups
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.o_proj = ResidualProjection(query_width, config.hidden_size, bias=False)
        self.q_norm = LlamaRMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = LlamaRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | BlockMask | None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output, (B, L, D) -> (B, L, D), and the attention weights, or None if there are none."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights


class OpenELMFeedForward(nn.Module):
    """SwiGLU feed-forward network (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: OpenELMConfig, layer_idx: int):
        super().__init__()
        width = config.ffn_widths[layer_idx]
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = ResidualProjection(width, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the output, (B, L, D) -> (B, L, D)."""
        return self.down_proj(silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class OpenELMDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward network, each with a norm before it and a residual connection around it."""

    def __init__(self, config: OpenELMConfig, layer_idx: int):
        super().__init__()
        self.attention_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = OpenELMAttention(config, layer_idx)
        self.ffn_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = OpenELMFeedForward(config, layer_idx)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Return the hidden states after the layer, (B, L, D) -> (B, L, D)."""
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), **kwargs)[0]
        return hidden_states + self.ffn(self.ffn_norm(hidden_states))


class OpenELMPreTrainedModel(PreTrainedModel):
    """Properties of the family that transformers uses."""

    config: OpenELMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OpenELMDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": OpenELMDecoderLayer, "attentions": OpenELMAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights from a normal distribution.

        The variance is 1 / input width, and 1 / (2 * layers * hidden_size) for residual projections.
        """
        if isinstance(module, ResidualProjection):
            init.normal_(module.weight, std=(2 * self.config.num_hidden_layers * self.config.hidden_size) ** -0.5)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
        else:
            super()._init_weights(module)


class OpenELMModel(OpenELMPreTrainedModel):
    """The embedding and the layers, without the output head."""

    def __init__(self, config: OpenELMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [OpenELMDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]  # uses only fields that both configurations have
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | BlockMask | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Return the hidden states after the final norm, (B, L, D).

        The input is either `input_ids` (B, L) or `inputs_embeds` (B, L, D). `attention_mask` is a padding mask (B, L)
        or a mask of the attention kernel, such as a boolean (B, 1, L, L) for SDPA or a BlockMask for FlexAttention.
        Raises ValueError for both inputs or neither.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = past_length + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        # A mask in the kernel's format, such as a BlockMask, is returned unchanged.
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,  # type: ignore[arg-type]
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states, position_embeddings = inputs_embeds, self.rotary_emb(inputs_embeds, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class OpenELMForCausalLM(OpenELMPreTrainedModel, GenerationMixin):
    """The layers and the output head; the head shares the weight of the embedding if `tie_word_embeddings` is true."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: OpenELMConfig):
        super().__init__(config)
        self.model = OpenELMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | BlockMask | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, L, V), and with `labels` (B, L) the next-token loss.

        For the other arguments see OpenELMModel.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(output.last_hidden_state, logits_to_keep))
        loss = (
            None
            if labels is None
            else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


AutoConfig.register("openelm", OpenELMConfig)
AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM)
