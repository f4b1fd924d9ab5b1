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

Mask = torch.Tensor | BlockMask
FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
NARROWEST_FLEX_HEAD = 16
"""Smallest head width for which FlexAttention's kernel compiles (torch/_inductor/kernel/flex/flex_attention.py)."""


def resolve_attention(setting: str, device: torch.device, config: PretrainedConfig) -> str:
    """Return the attention kernel of a setting, and resolve `auto`.

    `auto` is FlexAttention on CUDA. It is SDPA (for Gemma 2: eager) for narrow heads, and on CPU, where FlexAttention
    has no backward pass. Raises UserError if the device, the family or the head width does not support the kernel.
    """
    capped = config.model_type == "gemma2"
    narrow = head_width(config) < NARROWEST_FLEX_HEAD
    dense = "eager" if capped else "sdpa"
    if setting == "auto":
        setting = "flex_attention" if device.type == "cuda" and not narrow else dense
    if setting == "flex_attention" and narrow:
        raise UserError(
            f"model.attention: flex_attention needs heads at least {NARROWEST_FLEX_HEAD} wide, "
            f"not {head_width(config)}; leave it at auto"
        )
    if setting == "flex_attention" and device.type == "cpu":
        raise UserError("model.attention: flex_attention has no backward pass on CPU; leave it at auto")
    if setting == "flex_attention" and config.attention_dropout:
        raise UserError(
            "model.attention: flex_attention does not support attention_dropout; set attention_dropout to 0 in the "
            f"model's shape, or model.attention to {dense}"
        )
    if setting == "sdpa" and capped:
        raise UserError("model.attention: sdpa cannot cap attention scores, but gemma2 does; leave it at auto")
    return setting


def head_width(config: PretrainedConfig) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_mask(
    visible_until: torch.Tensor, positions: torch.Tensor, attention: str, config: PretrainedConfig, dtype: torch.dtype
) -> Mask | dict[str, Mask]:
    """Return the attention_mask argument of a model of `config`: one mask, or one per layer type.

    `visible_until` and `positions` are (B, L). `dtype` is the data type of the attention scores.
    """
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return visibility_mask(visible_until, attention, dtype=dtype)
    masks: dict[str, Mask] = {}
    if FULL_ATTENTION in layer_types:
        masks[FULL_ATTENTION] = visibility_mask(visible_until, attention, dtype=dtype)
    if SLIDING_ATTENTION in layer_types:
        masks[SLIDING_ATTENTION] = visibility_mask(
            visible_until, attention, positions=positions, window=config.sliding_window, dtype=dtype
        )
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
