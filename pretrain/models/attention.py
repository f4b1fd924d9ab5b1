"""Attention masks: the visibility rule in the format of each attention kernel.

Query q sees key p exactly if p <= q < visible_until[p] (see data_prep/layout.py). In a layer with a sliding window,
their positions must also differ by less than the window. The window counts position ids, not indices in the row: other
segments of the record may be between a segment and its parent.

Gemma 2 caps its attention scores, and SDPA cannot do this. The eager kernels of all families *add* the mask to the
scores, so a boolean mask would mask nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PretrainedConfig

from data_prep.utils.console import UserError
from pretrain.models.structure import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    attention_dropout,
    head_width,
    layer_types,
    model_class,
)

Mask = torch.Tensor | BlockMask
NARROWEST_FLEX_HEAD = 16
"""Smallest head width for which FlexAttention's kernel compiles (torch/_inductor/kernel/flex/flex_attention.py)."""


def resolve_attention(setting: str, device: torch.device, config: PretrainedConfig) -> str:
    """Return the attention kernel of a setting, and resolve `auto`.

    `auto` is FlexAttention on CUDA. It is SDPA (for models without SDPA, such as Gemma 2: eager) for narrow heads, for
    models without FlexAttention, and on CPU, where FlexAttention has no backward pass. Raises UserError if the device,
    the model or the head width does not support the kernel.
    """
    supported = model_class(config)
    narrow = head_width(config) < NARROWEST_FLEX_HEAD
    dense = "sdpa" if supported._supports_sdpa else "eager"
    if setting == "auto":
        flexible = supported._supports_flex_attn and device.type == "cuda" and not narrow
        setting = "flex_attention" if flexible else dense
    if setting == "flex_attention" and not supported._supports_flex_attn:
        raise UserError(f"model.attention: {config.model_type} does not support flex_attention; leave it at auto")
    if setting == "flex_attention" and narrow:
        raise UserError(
            f"model.attention: flex_attention needs heads at least {NARROWEST_FLEX_HEAD} wide, "
            f"not {head_width(config)}; leave it at auto"
        )
    if setting == "flex_attention" and device.type == "cpu":
        raise UserError("model.attention: flex_attention has no backward pass on CPU; leave it at auto")
    if setting == "flex_attention" and attention_dropout(config):
        raise UserError(
            "model.attention: flex_attention does not support attention_dropout; set attention_dropout to 0 in the "
            f"model's shape, or model.attention to {dense}"
        )
    if setting == "sdpa" and not supported._supports_sdpa:
        problem = (
            f"sdpa cannot cap attention scores, but {config.model_type} does"
            if getattr(config, "attn_logit_softcapping", None)
            else f"{config.model_type} does not support sdpa"
        )
        raise UserError(f"model.attention: {problem}; leave it at auto")
    return setting


def attention_mask(
    visible_until: torch.Tensor, positions: torch.Tensor, attention: str, config: PretrainedConfig, dtype: torch.dtype
) -> Mask | dict[str, Mask]:
    """Return the attention_mask argument of a model of `config`: one mask, or one per layer type.

    If a model does not name its layer types, a sliding window of its configuration is the window of all layers.
    `visible_until` and `positions` are (B, L). `dtype` is the data type of the attention scores.
    """
    types = layer_types(config)
    window = getattr(config, "sliding_window", None) or None
    full = functools.partial(visibility_mask, visible_until, attention, dtype=dtype)
    sliding = functools.partial(full, positions=positions, window=window)
    if not types:
        return sliding() if window else full()
    masks: dict[str, Mask] = {}
    if FULL_ATTENTION in types:
        masks[FULL_ATTENTION] = full()
    if SLIDING_ATTENTION in types:
        masks[SLIDING_ATTENTION] = sliding()
    return masks


def visibility_mask(
    visible_until: torch.Tensor,
    attention: str,
    *,
    positions: torch.Tensor | None = None,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Mask:
    """Return the mask of a kernel, (B, L) -> (B, 1, L, L), limited to a sliding window of `window` positions if given.

    sdpa: boolean, True where the query sees the key. eager: 0 where the query sees the key, and the
    smallest finite number elsewhere, to be added to the scores. flex_attention: a block mask.
    """
    rows, length = visible_until.shape
    device = visible_until.device
    if attention == "flex_attention":
        visible_until = visible_until.int()  # read for each entry of a partial block
        positions = None if positions is None else positions.int()

    def visible(row, head, query, key):
        is_visible = (key <= query) & (query < visible_until[row, key])
        if window is None:
            return is_visible
        assert positions is not None
        return is_visible & (positions[row, query] - positions[row, key] < window)

    if attention == "flex_attention":
        # The compiled function never builds the dense mask.
        make = _compiled_create_block_mask() if visible_until.is_cuda else create_block_mask
        block_mask: BlockMask = make(visible, rows, None, length, length, device=device.type)
        return block_mask
    index = torch.arange(length, device=device)
    mask = visible(torch.arange(rows, device=device)[:, None, None], None, index[:, None], index)[:, None]
    if attention == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, torch.finfo(dtype).min)


@functools.cache
def _compiled_create_block_mask() -> Callable[..., Any]:
    return torch.compile(create_block_mask)
