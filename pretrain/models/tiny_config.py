"""A tiny configuration with the structure of a given one: its kinds of layers, head grouping, RoPE, caps and tying."""

from typing import Any

from transformers import PretrainedConfig

from pretrain.models.structure import head_width

ROW = 64
"""Number of positions of a row of the tiny model."""
VOCABULARY = 96
WINDOW = 5
"""Sliding window of the tiny model: shorter than its sequences."""
HEAD_WIDTH = 16
SIZES = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 2 * ROW,
    "sliding_window": WINDOW,
    "keep_window_size": WINDOW,
    "original_max_position_embeddings": 8,
    "intermediate_size": 80,
    "ffn_dim": 80,
    # multi-head latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "rotary_dim": 8,
    # layer-wise scaling
    "ffn_dim_divisor": 16,
}
"""Sizes of the tiny model; only the ones that a configuration has, with a value other than 0 or None, are used.

Lengths that switch something on are shorter than a row, because a longer row may exceed the original ones.
"""


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of a tiny model with the structure of `config`.

    It has one layer of each kind, and at least two. What `config` sets otherwise, such as soft caps, RoPE, norms,
    multipliers and tied embeddings, is kept. Raises the exceptions of transformers if it has no such model.
    """
    values = config.to_dict()
    heads, key_value_heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    tiny_heads = min(heads or 4, 4)
    key_value = tiny_heads if key_value_heads in (None, heads) else min(key_value_heads, 2)
    # the heads together are as wide as the hidden states only if they are in `config`
    wider = bool(heads and values.get("head_dim") and head_width(config) * heads != config.hidden_size)
    width = (tiny_heads + wider) * HEAD_WIDTH
    sizes = {
        "hidden_size": width,
        "num_attention_heads": tiny_heads,
        "num_key_value_heads": key_value,
        # with multi-head latent attention, the width of the rotated part
        "head_dim": SIZES["qk_rope_head_dim"] if values.get("qk_rope_head_dim") else HEAD_WIDTH,
        "word_embed_proj_dim": width if values.get("word_embed_proj_dim") == config.hidden_size else 2 * width,
    }
    always = sizes | {name: size for name, size in SIZES.items() if name.endswith("token_id")}
    changes = {
        own: size
        for name, size in (SIZES | sizes).items()
        if (own := config.attribute_map.get(name, name)) in values and (values[own] or name in always)
    }
    return type(config).from_dict(_shorten(values | changes | _layers(config, values)))


def _shorten(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with the length up to which RoPE is not scaled made shorter than a row."""
    name = "original_max_position_embeddings"
    return {
        key: _shorten(value) if isinstance(value, dict) else SIZES[name] if key == name and value else value
        for key, value in values.items()
    }


def _layers(config: PretrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Return the number of layers of the tiny model, and the fields of `values` that have a value for each layer.

    Layers that differ in one of these fields are different kinds. A list of the numbers of all layers is not a
    field of this kind.
    """
    layers = config.num_hidden_layers
    fields = {
        name: value
        for name, value in values.items()
        if isinstance(value, list) and len(value) == layers and value != list(range(layers))
    }
    first_of_kind: dict[str, int] = {}
    for layer in range(layers):
        first_of_kind.setdefault(repr([value[layer] for value in fields.values()]), layer)
    chosen = sorted(first_of_kind.values())
    if len(chosen) == 1:
        chosen = [chosen[0], min(chosen[0] + 1, layers - 1)]
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return {name: len(chosen)} | {name: [value[layer] for layer in chosen] for name, value in fields.items()}
