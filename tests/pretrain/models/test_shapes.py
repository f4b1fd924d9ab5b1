"""Published model shapes, and invalid shapes."""

import json

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import pretrain.models.openelm  # noqa: F401  registers the family
from data_prep.utils.console import UserError
from pretrain.models.language_model import build_model_config, pretrained_config
from tests.commands import ROOT
from tests.families import FAMILIES, family_of

FOLDER = ROOT / "configs" / "models"
PUBLISHED = {
    "llama_1b": (128256, 1_235_814_400),
    "llama_3b": (128256, 3_212_749_824),
    "llama_8b": (128256, 8_030_261_248),
    "gemma2_2b": (256000, 2_614_341_888),
    "olmo2_1b": (100352, 1_484_916_736),
    "olmo2_7b": (100352, 7_298_617_344),
    "openelm_270m": (32000, 271_527_168),
    "openelm_1b": (32000, 1_079_891_456),
    "qwen3_0.6b": (151936, 596_049_920),
    "mistral_7b": (32000, 7_241_732_096),
    "smollm3_3b": (128256, 3_075_098_624),
    "olmo3_7b": (100278, 7_298_011_136),
    "gemma3_text_1b": (262144, 999_885_952),
}
"""Vocabulary size and number of parameters of the published models."""
THETA = {
    "llama": 500_000.0,
    "gemma2": 10_000.0,
    "olmo2": 500_000.0,
    "openelm": 10_000.0,
    "qwen3": 1_000_000.0,
    "mistral": 10_000.0,
    "smollm3": 5_000_000.0,
    "olmo3": 500_000.0,
    "gemma3_text": 1_000_000.0,
}
"""Base of the rotary embedding; in layers with full attention, if layers with windows have another one."""


def read(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_published_number_of_parameters(name):
    vocabulary, parameters = PUBLISHED[name]
    config = AutoConfig.for_model(family_of(name), vocab_size=vocabulary, **read(name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_published_rotary_embedding(name):
    rope = read(name)["rope_parameters"]
    rope = rope.get("full_attention", rope)
    assert rope["rope_theta"] == THETA[family_of(name)]
    if family_of(name) == "llama":  # Llama 3.1 stretches low frequencies by 8, Llama 3.2 by 32
        assert rope == {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0 if name == "llama_8b" else 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_every_file_is_a_shape_of_its_family(name, tokenizer):
    config = build_model_config(family_of(name), read(name), tokenizer, 256)
    assert config.model_type == family_of(name) and config.vocab_size == 512
    for key, value in read(name).items():
        assert getattr(config, key) == value


def test_a_value_that_the_family_ignores_is_refused(tokenizer):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": None}
    assert build_model_config("qwen3", shape, tokenizer, 64).num_key_value_heads == 2
    with pytest.raises(UserError, match="qwen3 ignores sliding_window with these values: it is None, not 6"):
        build_model_config("qwen3", shape | {"sliding_window": 6}, tokenizer, 64)


def test_every_family_has_a_tiny_shape():
    assert {family_of(path.stem) for path in FOLDER.glob("*_tiny.yaml")} == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type must be one of default, linear, llama3, yarn, not dynamic",
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            "rope_type must be one of default, linear, llama3, yarn, not dynamic",
        ),
        ("mistral", {"sliding_windows": 4}, "mistral has no option 'sliding_windows'"),
        ("smollm3", {"no_rope_layers": [1]}, "smollm3 cannot be built with these values"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window must be positive"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "llama cannot be built with these values"),
        ("llama", {"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ("gemma2", {"hidden_activation": "nonsense"}, "unknown hidden_activation 'nonsense'"),
        ("gemma2", {"sliding_window": None}, "sliding_window must be positive"),
        (
            "gemma2",
            {"layer_types": ["chunked_attention", "full_attention"]},
            "layer_types must be full_attention or sliding_attention, not chunked",
        ),
        ("gemma2", {"layer_types": ["full_attention"]}, "gemma2 cannot be built with these values"),
        ("gemma2", {"use_bidirectional_attention": True}, "lets a token see the token that it predicts"),
        ("olmo2", {"intermediate": 3}, "olmo2 has no option 'intermediate'"),
        ("openelm", {"num_attention_heads": 4}, "openelm has no option 'num_attention_heads'"),
        ("openelm", {"initializer_range": 0.1}, "openelm has no option 'initializer_range'"),
        ("openelm", {"qkv_multipliers": [0.5]}, "qkv_multipliers must be two positive numbers"),
        ("openelm", {"head_dim": 7}, "openelm cannot be built with these values"),
        ("openelm", {"vocab_size": 7}, "vocab_size comes from the tokenizer"),
    ],
)
def test_an_invalid_shape_is_refused(family, changes, message, tokenizer):
    with pytest.raises(UserError, match=message):
        build_model_config(family, read(f"{family}_tiny") | changes, tokenizer, 64)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "config.json: rope_type must be one of default, linear",
        ),
        (
            "openelm",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "config.json: rope_type must be one of default, linear",
        ),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "config.json: rope_type must be one of default, linear",
        ),
        (
            "llama",
            {"num_key_value_heads": 3},
            "config.json: num_attention_heads .* must be a multiple of num_key_value_heads",
        ),
        ("llama", {"attention_dropout": 1.5}, "config.json: attention_dropout must be at least 0 and below 1"),
        ("llama", {"num_hidden_layers": "two"}, "cannot load "),
        (
            "gemma2",
            {"sliding_window": None},
            "config.json: gemma2 has layers of sliding attention: sliding_window must be positive",
        ),
        (
            "gemma2",
            {"layer_types": ["chunked_attention", "full_attention"]},
            "config.json: layer_types must be full_attention or sliding_attention",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, "config.json: use_bidirectional_attention"),
        ("gemma2", {"hidden_activation": "nonsense"}, "config.json: unknown hidden_activation"),
        ("openelm", {"qkv_multipliers": [0.5]}, "cannot load "),
    ],
)
def test_init_from_is_refused_for_the_same_reasons_as_a_shape(family, changes, message, tokenizer, tmp_path):
    build_model_config(family, read(f"{family}_tiny"), tokenizer, 64).save_pretrained(tmp_path)
    pretrained_config(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in values.items() if value is not None or key == "sliding_window"})
    )
    with pytest.raises(UserError, match=f"^model.init_from: .*{message}"):
        pretrained_config(tmp_path)
