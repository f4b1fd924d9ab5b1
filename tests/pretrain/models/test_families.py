"""Packed rows of each family equal separate unpadded forward passes, and wrong masks break the equality."""

import random
import shutil
from typing import NamedTuple

import pytest
import torch
from torch.nn.attention import flex_attention
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.models.attention import attention_mask, visibility_mask
from pretrain.models.export import load_language_model, write_export
from pretrain.models.language_model import LanguageModel
from tests.families import FAMILIES, embedding_scale

KERNELS = [
    (family, kernel)
    for family in FAMILIES
    for kernel in ("sdpa", "eager")
    if (family, kernel) != ("gemma2", "sdpa")  # SDPA cannot cap scores
]
TOLERANCE, MUTANT = 1e-5, 0.1
ROW, K = 80, 2


class Packed(NamedTuple):
    """Rows as in a Batch, and their sequences: the tokens of each sequence, and the (row, column) of each token."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    visible_until: torch.Tensor
    sequences: list[tuple[list[int], list[tuple[int, int]]]]


@pytest.fixture(scope="module")
def packed() -> Packed:
    """Return rows of records in the joint layout: [context] [target] [predictor tokens] [lone target].

    Some views are longer than the window of 6 positions.
    """
    rng = random.Random(0)
    ids, positions, until = (
        torch.zeros(2, ROW, dtype=torch.long),
        torch.zeros(2, ROW, dtype=torch.long),
        torch.arange(1, ROW + 1).repeat(2, 1),
    )
    sequences = []
    for row in range(2):
        begin = 0
        for c, t in ((9, 8), (3, 11), (12, 2)):
            context, target = ([rng.randrange(5, 500) for _ in range(length)] for length in (c, t))
            predictors = [512 + index for index in range(K)]
            end = begin + c + t + K + t
            places = [(row, place) for place in range(begin, end)]
            ids[row, begin:end] = torch.tensor(context + target + predictors + target)
            positions[row, begin:end] = torch.tensor([*range(c + t), *range(c, c + K), *range(t)])
            until[row, begin : begin + c] = begin + c + t + K
            until[row, begin + c : begin + c + t] = begin + c + t
            until[row, begin + c + t : begin + c + t + K] = begin + c + t + K
            until[row, begin + c + t + K : end] = end
            sequences += [
                (context + target, places[: c + t]),
                (context + predictors, places[:c] + places[c + t : c + t + K]),
                (target, places[c + t + K :]),
            ]
            begin = end
    return Packed(ids, positions, until, sequences)


def separate_states(model: LanguageModel, packed: Packed) -> torch.Tensor:
    """Return the states of separate causal passes of the plain model over the sequences: (2, ROW, D), 0 in padding."""
    scale = embedding_scale(model.causal_lm.config)
    predictors, word_embeddings = scale * model.predictor.weight, model.causal_lm.get_input_embeddings()
    states = torch.zeros(2, ROW, model.hidden_size)
    for tokens, places in packed.sequences:
        embedded = torch.stack(
            [predictors[token - 512] if token >= 512 else word_embeddings(torch.tensor(token)) for token in tokens]
        )
        hidden = model.causal_lm.model(inputs_embeds=embedded[None], use_cache=False).last_hidden_state[0]
        for state, (row, place) in zip(hidden, places, strict=True):
            states[row, place] = state
    return states


def states_with_mask(model: LanguageModel, packed: Packed, mask) -> torch.Tensor:
    return model.causal_lm.model(
        inputs_embeds=model.embed(packed.token_ids), attention_mask=mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state


def error(states: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of a hidden state outside padding. States are about one in size."""
    not_padding = expected.any(dim=-1)
    assert 0.5 < expected[not_padding].std() < 2 and not not_padding.all()
    return (states - expected)[not_padding].abs().max().item()


def with_kernel(model: LanguageModel, kernel: str) -> LanguageModel:
    model.causal_lm.set_attn_implementation(kernel)
    model.attention = kernel
    return model


@pytest.mark.parametrize(("family", "kernel"), KERNELS)
@torch.no_grad()
def test_packed_rows_equal_separate_unpadded_forwards(family, kernel, packed, make_model):
    model = with_kernel(make_model(K, family=family), kernel)
    states = model(packed).view(2, ROW, -1)
    assert error(states, separate_states(model, packed)) < TOLERANCE
    assert states.isfinite().all(), "padding positions must see themselves"


def masks(model, packed, positions=None):
    return attention_mask(
        packed.visible_until,
        packed.positions if positions is None else positions,
        "eager",
        model.causal_lm.config,
        torch.float32,
    )


def window_by_row_index(model, packed):
    return masks(model, packed, torch.arange(ROW).expand(2, -1))


def window_ignored(model, packed):
    return dict.fromkeys(("full_attention", "sliding_attention"), visibility_mask(packed.visible_until, "eager"))


def window_everywhere(model, packed):
    return dict.fromkeys(("full_attention", "sliding_attention"), masks(model, packed)["sliding_attention"])


def window_off_by_one(model, packed):
    sliding = visibility_mask(
        packed.visible_until, "eager", positions=packed.positions, window=model.causal_lm.config.sliding_window + 1
    )
    return masks(model, packed) | {"sliding_attention": sliding}


def boolean_masks(model, packed):
    return {kind: mask == 0 for kind, mask in masks(model, packed).items()}


def one_mask(model, packed):
    """Return one mask instead of a dictionary. transformers uses it for both layer types."""
    return visibility_mask(packed.visible_until, "eager")


@pytest.mark.parametrize(
    "mutant", [window_by_row_index, window_ignored, window_everywhere, window_off_by_one, boolean_masks, one_mask]
)
@pytest.mark.parametrize("family", ["gemma2", "olmo3", "gemma3_text"])
@torch.no_grad()
def test_a_wrong_mask_for_two_kinds_of_layers_breaks_the_equality(family, mutant, packed, make_model):
    model = with_kernel(make_model(K, family=family), "eager")
    expected = separate_states(model, packed)
    assert error(states_with_mask(model, packed, masks(model, packed)), expected) < TOLERANCE
    assert error(states_with_mask(model, packed, mutant(model, packed)), expected) > MUTANT


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_boolean_mask_for_an_eager_kernel_breaks_the_equality(family, packed, make_model):
    model = with_kernel(make_model(K, family=family), "eager")
    right = masks(model, packed)
    wrong = {kind: mask == 0 for kind, mask in right.items()} if isinstance(right, dict) else right == 0
    assert error(states_with_mask(model, packed, wrong), separate_states(model, packed)) > MUTANT


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_flex_attention_has_the_same_states(family, packed, make_model, monkeypatch):
    """Run the forward pass on CPU without compilation, for Gemma with both masks and capped scores."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    model = make_model(K, family=family)
    expected = separate_states(model, packed)
    with torch.compiler.set_stance("force_eager"):
        states = with_kernel(model, "flex_attention")(packed).view(2, ROW, -1)
    assert error(states, expected) < TOLERANCE
    if family == "gemma2":
        model.causal_lm.config.attn_logit_softcapping = None
        for layer in model.causal_lm.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        with torch.compiler.set_stance("force_eager"):
            assert error(model(packed).view(2, ROW, -1), expected) > 1e-3, "the cap must matter"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_match_the_plain_model(family, packed, make_model):
    model = make_model(K, family=family)
    logits = model.logits(model(packed)).view(2, ROW, -1)
    tokens, places = packed.sequences[0]
    rows, columns = zip(*places, strict=True)
    expected = model.causal_lm(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits[rows, columns], expected, rtol=1e-4, atol=1e-4)
    if family == "gemma2":
        raw = model.causal_lm.lm_head(model(packed)).view(2, ROW, -1)[rows, columns]
        torch.testing.assert_close(expected, 30 * torch.tanh(raw / 30), rtol=1e-4, atol=1e-4)
        assert (raw - expected).abs().max() > 0.01, "the cap must matter"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_predictor_embeddings_have_the_scale_of_word_embeddings(family, make_model):
    model = make_model(12, std=0.02, family=family)
    embedded = model.embed(torch.tensor([[*range(5, 500), *range(512, 524)]]))[0]
    assert embedded[495:].std() == pytest.approx(embedded[:495].std().item(), rel=0.1)
    scale = embedding_scale(model.causal_lm.config)
    torch.testing.assert_close(embedded[495:], scale * model.predictor.weight)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_export_loads_in_transformers_with_the_same_logits(
    family, packed, make_model, tokenizer, prepared, tmp_path
):
    model = make_model(K, family=family).eval()
    skeleton, folder = tmp_path / "model", tmp_path / "export"
    shutil.copytree(prepared / "tokenizer", skeleton)
    model.causal_lm.config.save_pretrained(skeleton)
    write_export(folder, skeleton, model.state_dict(), {"step": 1})
    tokens = torch.tensor([packed.sequences[0][0]])
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(loaded(tokens).logits, model.causal_lm(tokens).logits, rtol=1e-5, atol=1e-5)
    reloaded, _ = load_language_model(folder, "auto", torch.device("cpu"))
    assert torch.equal(reloaded(packed), model(packed))
    assert AutoTokenizer.from_pretrained(folder)("some text")["input_ids"] == tokenizer.encode_batch(["some text"])[0]
