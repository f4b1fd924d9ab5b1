"""One visibility rule, whatever kernel applies it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention

from pretrain.data.batch import assemble
from pretrain.data.layout import Pairing, make_layout
from pretrain.data.loader import Loader, Rows
from pretrain.models.attention import resolve_attention, visibility_mask

LENGTH = 384
BLOCK = 128


@pytest.fixture(scope="module", params=["joint", "independent"])
def visible_until(request, corpus, specials) -> torch.Tensor:
    """Real rows, and an empty one."""
    layout = make_layout(request.param, specials, pairing=Pairing(2))
    rows = Loader(corpus, layout, LENGTH, seed=0, dropout=0.3).next_rows(3)
    return assemble(Rows.join([rows], 4), corpus, layout, specials, LENGTH, int(rows.paired.sum())).visible_until


def test_the_boolean_mask_is_the_rule_read_literally(visible_until):
    mask = visibility_mask(visible_until, "sdpa")
    assert mask.shape == (4, 1, LENGTH, LENGTH) and mask.dtype == torch.bool
    until = visible_until.numpy()
    for row in range(4):
        for query in range(0, LENGTH, 7):
            expected = [key <= query < until[row, key] for key in range(LENGTH)]
            np.testing.assert_array_equal(mask[row, 0, query], expected)
    assert mask.any(dim=-1).all(), "a query that sees nothing makes softmax undefined"


def test_flex_attention_has_the_same_mask(visible_until):
    dense = visibility_mask(visible_until, "sdpa")
    block_mask = visibility_mask(visible_until, "flex_attention")
    assert torch.equal(flex_attention.create_mask(block_mask.mask_mod, 4, 1, LENGTH, LENGTH, device="cpu"), dense)
    tiles = dense.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).any(dim=5).any(dim=3)
    assert torch.equal(block_mask.to_dense().bool(), tiles), "a block is skipped exactly where nothing in it is visible"
    assert not tiles.all(), "the test needs a block to skip"


def test_flex_attention_has_the_same_output(visible_until, monkeypatch):
    """Its forward pass on CPU without compilation."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    generator = torch.Generator().manual_seed(0)
    query = 3 * torch.randn(4, 4, LENGTH, 16, generator=generator)
    key, value = (torch.randn(4, 2, LENGTH, 16, generator=generator) for _ in range(2))
    flex = flex_attention.flex_attention(query, key, value, block_mask=visibility_mask(visible_until, "flex_attention"), enable_gqa=True)
    sdpa = F.scaled_dot_product_attention(query, key, value, attn_mask=visibility_mask(visible_until, "sdpa"), enable_gqa=True)
    torch.testing.assert_close(flex, sdpa, rtol=1e-5, atol=1e-5)
    causal = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert (sdpa - causal).abs().max() > 0.1, "the mask must matter"


def test_auto_is_what_the_device_can_differentiate():
    assert resolve_attention("auto", torch.device("cpu")) == "sdpa"
    assert resolve_attention("auto", torch.device("cuda")) == "flex_attention"
    assert resolve_attention("sdpa", torch.device("cuda")) == "sdpa"
