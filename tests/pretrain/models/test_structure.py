"""The parts and sizes of models whose parts have other names than in Llama."""

import pytest
import torch
from torch import nn

from pretrain.models.hidden_matrices import hidden_matrices
from pretrain.models.language_model import LanguageModel, build_model_config, random_causal_lm
from pretrain.models.layer_states import LayerStates
from pretrain.models.structure import logit_scale
from pretrain.planning.flops import count_parameters
from pretrain.planning.memory import LayerWidths, layer_widths

GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10}
SHAPES = {
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4},
    "opt": {
        "hidden_size": 48,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 48,
    },
    "phi": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    "phi3": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, **GROUPED},
    "qwen3": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16, **GROUPED},
    "youtu": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    | LATENT
    | {"num_key_value_heads": 4, "head_dim": 4},
}
EMBEDDINGS = {"gpt2": 512 + 64, "opt": 512 + 64 + 2}
"""Rows of the embeddings of tokens and positions; otherwise there are 512."""
WIDTHS = {
    "gpt2": LayerWidths(queries=48, keys=48, feed_forward=96, norms=96),  # 192 wide, without a gate
    "opt": LayerWidths(queries=48, keys=48, feed_forward=48, norms=96),
    "phi": LayerWidths(queries=48, keys=48, feed_forward=48, norms=48),
    "phi3": LayerWidths(queries=48, keys=24, feed_forward=96, norms=96),
    "qwen3": LayerWidths(queries=64, keys=32, feed_forward=96, norms=192),
    "youtu": LayerWidths(queries=44, keys=44, feed_forward=96, norms=136),
}


@pytest.fixture(params=SHAPES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family, tokenizer) -> LanguageModel:
    config = build_model_config(family, SHAPES[family], tokenizer, 64)
    return LanguageModel(random_causal_lm(config, "eager", torch.float32), 2, "eager")


def test_parameters_are_counted_by_part(model, family):
    counts = count_parameters(model, nn.Module())
    assert counts.embedding == EMBEDDINGS.get(family, 512) * 48
    assert counts.head == 512 * 48 + 512 * (family == "phi"), "Phi has a bias"
    assert counts.tied == (family in ("gpt2", "opt", "youtu"))
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    inner = sum(parameter.numel() for layer in model.layers for parameter in layer.parameters())
    assert 0 < counts.layers - inner <= 96, "the final norm"


def test_muon_trains_the_matrices_of_the_layers_only(model):
    matrices = {id(parameter) for layer in model.layers for parameter in layer.parameters() if parameter.dim() == 2}
    assert {id(matrix) for matrix in hidden_matrices(model, nn.Module())} == matrices


def test_the_widths_of_a_layer_follow_from_its_modules(model, family):
    assert layer_widths(model) == [WIDTHS[family]] * 2


def test_the_states_of_layers_are_recorded(model):
    recorder = LayerStates(model, [0, 1, 2])
    embedded = torch.randn(1, 8, 48)
    with recorder.record() as states, torch.no_grad():
        model.transformer(inputs_embeds=embedded, use_cache=False)
    assert {number: state.shape for number, state in states.items()} == dict.fromkeys((0, 1, 2), (8, 48))


def test_the_scale_of_the_logits_follows_from_the_configuration(tokenizer):
    shape = {"hidden_size": 48, "num_hidden_layers": 1, **GROUPED}
    assert logit_scale(build_model_config("cohere", shape | {"logit_scale": 0.25}, tokenizer, 64)) == 0.25
    assert logit_scale(build_model_config("granite", shape | {"logits_scaling": 8.0}, tokenizer, 64)) == 1 / 8
    assert logit_scale(build_model_config("llama", shape, tokenizer, 64)) == 1
