"""The visibility rule as the mask that an attention kernel wants.

Query q sees key p exactly if p <= q < visible_until[p] (see pretrain/data/layout.py); in a layer with a sliding window,
only if their positions differ by less than the window, too. The window counts position ids, not places in the row:
other segments of the record may stand between a segment and the one it goes on from.

Gemma 2 caps its attention scores, which SDPA cannot. Its eager kernel, like that of every family, *adds* the mask to the
scores: a boolean one would mask nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PretrainedConfig

from data_prep.console import UserError

Mask = torch.Tensor | BlockMask
FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
NARROWEST_FLEX_HEAD = 16
"""Head width below which FlexAttention's kernel cannot be compiled (torch/_inductor/kernel/flex/flex_attention.py)."""


def resolve_attention(setting: str, device: torch.device, config: PretrainedConfig) -> str:
    """Return the kernel for `auto`: FlexAttention on CUDA; on CPU, where it has no backward pass, and for narrow heads SDPA, or for Gemma 2 eager.

    Raises UserError for a kernel that the device, the family or the width of the heads cannot use.
    """
    capped = config.model_type == "gemma2"
    narrow = head_width(config) < NARROWEST_FLEX_HEAD
    if setting == "auto":
        setting = "flex_attention" if device.type == "cuda" and not narrow else "eager" if capped else "sdpa"
    if setting == "flex_attention" and narrow:
        raise UserError(
            f"model.attention: flex_attention needs heads at least {NARROWEST_FLEX_HEAD} wide, not {head_width(config)}; "
            "leave it at auto"
        )
    if setting == "flex_attention" and device.type == "cpu":
        raise UserError("model.attention: flex_attention has no backward pass on CPU; leave it at auto")
    if setting == "flex_attention" and config.attention_dropout:
        raise UserError(
            "model.attention: flex_attention has no attention_dropout; set that to 0 in the model's shape, "
            f"or model.attention to {'eager' if capped else 'sdpa'}"
        )
    if setting == "sdpa" and capped:
        raise UserError("model.attention: sdpa cannot cap attention scores, as gemma2 does; leave it at auto")
    return setting


def head_width(config: PretrainedConfig) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_mask(
    visible_until: torch.Tensor, positions: torch.Tensor, attention: str, config: PretrainedConfig, dtype: torch.dtype
) -> Mask | dict[str, Mask]:
    """What a model of `config` takes as its attention_mask: one mask, or one by kind of layer.

    `visible_until` and `positions` are (B, L), `dtype` is that of the attention scores.
    """
    full = visibility_mask(visible_until, attention, dtype=dtype)
    if getattr(config, "layer_types", None) is None:
        return full
    return {
        FULL_ATTENTION: full,
        SLIDING_ATTENTION: visibility_mask(
            visible_until, attention, positions=positions, window=config.sliding_window, dtype=dtype
        ),
    }


def visibility_mask(
    visible_until: torch.Tensor,
    attention: str,
    *,
    positions: torch.Tensor | None = None,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Mask:
    """(B, L) -> the (B, 1, L, L) mask of a kernel: of `window` positions where that is given.

    sdpa: boolean, True where the query may look. eager: 0 there and the smallest finite number elsewhere, to be added.
    flex_attention: a block mask.
    """
    rows, length = visible_until.shape
    device = visible_until.device
    if attention == "flex_attention":
        visible_until = visible_until.int()  # the kernel reads them for each entry of a partial block
        positions = None if positions is None else positions.int()

    def visible(row, head, query, key):
        seen = (key <= query) & (query < visible_until[row, key])
        if window is None:
            return seen
        assert positions is not None
        return seen & (positions[row, query] - positions[row, key] < window)

    if attention == "flex_attention":
        make = (
            _compiled_create_block_mask() if visible_until.is_cuda else create_block_mask
        )  # compiled, it never builds the dense mask
        block_mask: BlockMask = make(visible, rows, None, length, length, device=device.type)
        return block_mask
    place = torch.arange(length, device=device)
    mask = visible(torch.arange(rows, device=device)[:, None, None], None, place[:, None], place)[:, None]
    if attention == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, torch.finfo(dtype).min)


@functools.cache
def _compiled_create_block_mask() -> Callable[..., Any]:
    return torch.compile(create_block_mask)
