"""The visibility rule as the mask that an attention kernel wants.

Query q sees key p exactly if p <= q < visible_until[p] (see pretrain/data/layout.py).
"""

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from data_prep.console import UserError


def resolve_attention(setting: str, device: torch.device) -> str:
    """The kernel for `auto`: FlexAttention on CUDA; SDPA on CPU, where FlexAttention has no backward pass."""
    if setting == "auto":
        return "flex_attention" if device.type == "cuda" else "sdpa"
    if setting == "flex_attention" and device.type == "cpu":
        raise UserError("model.attention: flex_attention has no backward pass on CPU; leave it at auto")
    return setting


def visibility_mask(visible_until: torch.Tensor, attention: str) -> torch.Tensor | BlockMask:
    """(B, L) -> a boolean (B, 1, L, L) mask, True where the query may look, or FlexAttention's block mask."""
    rows, length = visible_until.shape
    if attention == "flex_attention":
        def visible(row, head, query, key):
            return (key <= query) & (query < visible_until[row, key])

        return create_block_mask(visible, rows, None, length, length, device=visible_until.device.type,
                                 _compile=visible_until.is_cuda)  # compiled, it never builds the dense mask
    query = torch.arange(length, device=visible_until.device)[:, None]
    key = torch.arange(length, device=visible_until.device)[None, :]
    return ((key <= query) & (query < visible_until[:, None, :]))[:, None]
