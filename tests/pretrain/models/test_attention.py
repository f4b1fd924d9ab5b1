"""The visibility rule is the same in every attention kernel."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention
from transformers import AutoConfig

import pretrain.models.openelm  # noqa: F401  registers the family
from data_prep.layout import Pairing, make_layout
from data_prep.utils.console import UserError
from pretrain.data.batch import assemble
from pretrain.data.loader import Loader, Rows
from pretrain.models.attention import attention_mask, resolve_attention, visibility_mask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTH = 384
BLOCK = 128
WINDOW = 7


@pytest.fixture(scope="module", params=["joint", "independent"])
def batch(request, corpus, specials):
    """Return a batch of real rows and an empty row."""
    layout = make_layout(request.param, specials, pairing=Pairing(2))
    rows = Loader(corpus, layout, LENGTH, seed=0, dropout=0.3).next_rows(3)
    return assemble(Rows.join([rows], 4), corpus, layout, specials, LENGTH, int(rows.paired.sum()))


@pytest.fixture(scope="module")
def visible_until(batch) -> torch.Tensor:
    return batch.visible_until


@pytest.fixture(scope="module")
def window(batch) -> dict:
    return {"positions": batch.positions, "window": WINDOW}


def test_the_boolean_mask_follows_the_visibility_rule(visible_until):
    mask = visibility_mask(visible_until, "sdpa")
    assert mask.shape == (4, 1, LENGTH, LENGTH) and mask.dtype == torch.bool
    until = visible_until.numpy()
    for row in range(4):
        for query in range(0, LENGTH, 7):
            expected = [key <= query < until[row, key] for key in range(LENGTH)]
            np.testing.assert_array_equal(mask[row, 0, query], expected)
    assert mask.any(dim=-1).all(), "a query that sees nothing makes softmax undefined"


def test_a_window_counts_positions_within_the_record(batch, visible_until, window):
    mask = visibility_mask(visible_until, "sdpa", **window)
    until, positions = visible_until.numpy(), batch.positions.numpy()
    for row in range(4):
        for query in range(0, LENGTH, 7):
            expected = [
                key <= query < until[row, key] and positions[row, query] - positions[row, key] < WINDOW
                for key in range(LENGTH)
            ]
            np.testing.assert_array_equal(mask[row, 0, query], expected)
    assert mask.diagonal(dim1=2, dim2=3).all(), "every query sees itself"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sliding", [False, True])
def test_the_additive_mask_is_finite_and_hides_the_same_keys(sliding, dtype, visible_until, window):
    window_arguments = window if sliding else {}
    additive = visibility_mask(visible_until, "eager", dtype=dtype, **window_arguments)
    assert additive.dtype == dtype and additive.isfinite().all()
    assert torch.equal(additive == 0, visibility_mask(visible_until, "sdpa", **window_arguments))
    scores = torch.randn(additive.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = (scores + additive).softmax(dim=-1)
    assert weights.isfinite().all() and not weights[additive != 0].any()


@pytest.mark.parametrize("sliding", [False, True])
def test_flex_attention_has_the_same_mask(sliding, visible_until, window):
    window_arguments = window if sliding else {}
    dense = visibility_mask(visible_until, "sdpa", **window_arguments)
    block_mask = visibility_mask(visible_until, "flex_attention", **window_arguments)
    assert torch.equal(flex_attention.create_mask(block_mask.mask_mod, 4, 1, LENGTH, LENGTH, device="cpu"), dense)
    tiles = dense.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).any(dim=5).any(dim=3)
    assert torch.equal(block_mask.to_dense().bool(), tiles), "a block is skipped exactly if nothing in it is visible"
    assert not tiles.all(), "the test needs a skipped block"


def test_flex_attention_has_the_same_output(visible_until, monkeypatch):
    """Run the forward pass of flex attention on CPU, without compilation."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    generator = torch.Generator().manual_seed(0)
    query = 3 * torch.randn(4, 4, LENGTH, 16, generator=generator)
    key, value = (torch.randn(4, 2, LENGTH, 16, generator=generator) for _ in range(2))
    flex = flex_attention.flex_attention(
        query, key, value, block_mask=visibility_mask(visible_until, "flex_attention"), enable_gqa=True
    )
    sdpa = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visibility_mask(visible_until, "sdpa"), enable_gqa=True
    )
    torch.testing.assert_close(flex, sdpa, rtol=1e-5, atol=1e-5)
    causal = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert (sdpa - causal).abs().max() > 0.1, "the mask must matter"


def config_of(family, **changes):
    return AutoConfig.for_model(family, **changes)


def test_gemma_has_a_mask_for_each_layer_type(batch, visible_until):
    masks = attention_mask(
        visible_until, batch.positions, "eager", config_of("gemma2", sliding_window=WINDOW), torch.float32
    )
    assert masks.keys() == {"full_attention", "sliding_attention"}
    assert torch.equal(masks["full_attention"], visibility_mask(visible_until, "eager"))
    assert torch.equal(
        masks["sliding_attention"], visibility_mask(visible_until, "eager", positions=batch.positions, window=WINDOW)
    )
    for family in ("llama", "olmo2", "openelm"):
        assert torch.equal(
            attention_mask(visible_until, batch.positions, "sdpa", config_of(family), torch.float32),
            visibility_mask(visible_until, "sdpa"),
        )


@pytest.mark.parametrize(
    ("family", "on_cpu"), [("llama", "sdpa"), ("gemma2", "eager"), ("olmo2", "sdpa"), ("openelm", "sdpa")]
)
def test_auto_selects_a_kernel_that_device_and_family_support(family, on_cpu):
    config = config_of(family)
    assert resolve_attention("auto", CPU, config) == on_cpu
    assert resolve_attention("auto", CUDA, config) == "flex_attention"
    assert resolve_attention("eager", CPU, config) == resolve_attention("eager", CUDA, config) == "eager"
    if family != "gemma2":
        assert resolve_attention("sdpa", CUDA, config) == "sdpa"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"head_dim": 12}),
        ("llama", {"hidden_size": 96, "num_attention_heads": 8}),
        ("gemma2", {"head_dim": 8}),
        ("openelm", {"head_dim": 8}),
    ],
)
def test_heads_too_narrow_for_flex_attention_get_a_different_kernel(family, changes):
    config = config_of(family, **changes)
    assert resolve_attention("auto", CUDA, config) == resolve_attention("auto", CPU, config)
    with pytest.raises(UserError, match=r"flex_attention needs heads at least 16 wide, not (8|12)"):
        resolve_attention("flex_attention", CUDA, config)


def test_the_mask_of_flex_attention_reads_32_bit_integers(batch, visible_until):
    mask = visibility_mask(visible_until, "flex_attention", positions=batch.positions, window=WINDOW)
    captured = [
        cell.cell_contents for cell in mask.mask_mod.__closure__ if isinstance(cell.cell_contents, torch.Tensor)
    ]
    assert len(captured) == 2 and {tensor.dtype for tensor in captured} == {torch.int32}


@pytest.mark.parametrize(
    ("setting", "device", "config", "message"),
    [
        ("flex_attention", CPU, config_of("llama"), "no backward pass on CPU"),
        ("sdpa", CPU, config_of("gemma2"), "sdpa cannot cap attention scores, but gemma2 does"),
        ("sdpa", CUDA, config_of("gemma2"), "sdpa cannot cap attention scores, but gemma2 does"),
        (
            "auto",
            CUDA,
            config_of("llama", attention_dropout=0.1),
            "flex_attention does not support attention_dropout; .* or model.attention to sdpa",
        ),
        (
            "auto",
            CUDA,
            config_of("gemma2", attention_dropout=0.1),
            "flex_attention does not support attention_dropout; .* or model.attention to eager",
        ),
    ],
)
def test_an_unsupported_kernel_is_refused(setting, device, config, message):
    with pytest.raises(UserError, match=message):
        resolve_attention(setting, device, config)
