"""The parts and sizes of a causal language model of transformers, whatever its family calls them."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
"""Types of layers, for which there is a mask."""


def model_class(config: PretrainedConfig) -> Any:
    """Return the class of the causal language model of a configuration."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def decoder_layers(causal_lm: Any) -> nn.ModuleList:
    """Return the layers of the transformer. Raises ValueError if they are not in one list."""
    lists = [
        module
        for module in causal_lm.base_model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(lists) != 1:
        raise ValueError(f"{type(causal_lm).__name__} has {len(lists)} lists of layers instead of one")
    return lists[0]


def head_width(config: PretrainedConfig) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def max_positions(config: PretrainedConfig) -> float:
    """Return the largest number of positions of a sequence; infinite if the model has no limit."""
    return getattr(config, "max_position_embeddings", None) or math.inf


def attention_dropout(config: PretrainedConfig) -> float:
    """Return the dropout of attention probabilities."""
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    return max(getattr(config, name, None) or 0 for name in names)


def logit_scale(config: PretrainedConfig) -> float:
    """Return the factor by which the model multiplies its logits: 1 except in Cohere's and Granite's models."""
    return (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)


def layer_types(config: PretrainedConfig) -> set[str]:
    """Return the types of the layers; empty if the model has one kind of layer and does not name it."""
    return set(getattr(config, "layer_types", None) or ())


def rope_types(config: PretrainedConfig) -> set[str]:
    """Return the RoPE types of the layers; empty without RoPE. Some models have separate RoPE for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return {str(one["rope_type"]) for one in (nested or [parameters]) if "rope_type" in one}
