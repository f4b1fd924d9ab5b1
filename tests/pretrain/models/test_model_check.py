"""The check of a tiny model accepts models that suit packed rows, and refuses the other ones with the reason."""

import json

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel, LlamaRotaryEmbedding

from data_prep.utils.console import UserError
from pretrain.models.language_model import build_model_config, pretrained_config
from pretrain.models.model_check import RECORDS, check_model, find_problem
from pretrain.models.tiny_config import ROW, tiny_config
from tests.commands import ROOT, run_command, write_config
from tests.commands import tiny_config as run_config
from tests.families import FAMILIES


def read(name):
    return yaml.safe_load((ROOT / "configs" / "models" / f"{name}.yaml").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_with_shapes_pass(family, tokenizer):
    before = torch.get_rng_state()
    check_model(build_model_config(family, read(f"{family}_tiny"), tokenizer, 64), "auto", "model.family")
    assert torch.equal(torch.get_rng_state(), before), "a run must not depend on the check"


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "cohere2", "granite", "minicpm3", "stablelm"])
def test_other_families_pass(family):
    """These have learned positions, fused matrices, scaled logits, or latent attention."""
    check_model(AutoConfig.for_model(family), "auto", "model.family")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Make the user's cache an empty folder and return it, because a model that passed is not checked again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jepa-pretrain"


def test_a_model_that_passed_is_not_checked_again_by_another_process(tokenizer, cache):
    def check(width):
        config = build_model_config("llama", read("llama_tiny") | {"hidden_size": width}, tokenizer, 64)
        find_problem.cache_clear()  # as in another process
        check_model(config, "auto", "x")
        return find_problem.cache_info().misses

    assert [check(32), check(32), check(64)] == [1, 0, 1]
    assert len(list(cache.iterdir())) == 2


def test_a_model_that_failed_is_checked_again(tokenizer, cache):
    config = AutoConfig.for_model("mixtral")
    for _ in range(2):
        find_problem.cache_clear()
        with pytest.raises(UserError, match="mixture of experts"):
            check_model(config, "auto", "x")
        assert find_problem.cache_info().misses == 1
    assert not cache.exists()


def test_a_check_of_the_same_model_is_made_once(tokenizer):
    config = build_model_config("llama", read("llama_tiny") | {"hidden_size": 96}, tokenizer, 64)
    check_model(config, "auto", "x")
    misses = find_problem.cache_info().misses
    check_model(build_model_config("llama", read("llama_tiny") | {"hidden_size": 96}, tokenizer, 64), "auto", "x")
    assert find_problem.cache_info().misses == misses


class CarryingMLP(LlamaMLP):
    """A layer with a state that it carries from token to token."""

    def forward(self, x):
        return super().forward(x) + x.cumsum(dim=1)


class BatchMLP(LlamaMLP):
    """A layer with a statistic of the batch."""

    def forward(self, x):
        return super().forward(x - x.mean(dim=(0, 1), keepdim=True)) if len(x) > 1 else super().forward(x)


class LookingAheadMLP(LlamaMLP):
    """A layer in which a token sees the last one."""

    def forward(self, x):
        return super().forward(x) + x[:, -1:]


class PaddingMLP(LlamaMLP):
    """A layer in which the tokens of a packed row see the padding at its end."""

    def forward(self, x):
        return super().forward(x) + (x[:, -1:] if x.shape[1] == ROW else 0)


class PredictorMLP(LlamaMLP):
    """A layer in which the context of the first record of a packed row sees its predictor tokens."""

    def forward(self, x):
        output = super().forward(x)
        if x.shape[1] == ROW:
            context, target = RECORDS[0][0]
            output[0, :context] += x[0, context + target]
        return output


class PlaceEmbedding(LlamaRotaryEmbedding):
    """Rotary embeddings of the places in the row instead of the positions."""

    def forward(self, x, position_ids):
        return super().forward(x, torch.arange(x.shape[1]).expand_as(position_ids))


class OwnMaskModel(LlamaModel):
    """A model that replaces the mask with a causal one."""

    def forward(self, *, attention_mask=None, position_ids=None, inputs_embeds=None, **others):
        return super().forward(position_ids=position_ids, inputs_embeds=inputs_embeds, **others)


class TwiceModel(LlamaModel):
    """A model that runs its layers twice."""

    def forward(self, *, attention_mask=None, position_ids=None, inputs_embeds=None, input_ids=None, **others):
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
        once = super().forward(inputs_embeds=embedded, **inputs, **others).last_hidden_state
        return super().forward(inputs_embeds=once, **inputs, **others)


class DeeperHead(nn.Sequential):
    """An output head that is not one matrix."""


def with_mlp(kind):
    def change(model):
        for layer in model.model.layers:
            layer.mlp.__class__ = kind

    return change


def scale_logits(model):
    model.register_forward_hook(lambda module, inputs, output: output.__setitem__("logits", 3 * output["logits"]))


FAULTS = {
    "carries_state": (with_mlp(CarryingMLP), "a state passes from record to record in a row"),
    "batch_statistics": (with_mlp(BatchMLP), "the rows of a batch influence each other"),
    "looks_ahead": (with_mlp(LookingAheadMLP), "its attention is not causal: a token sees the tokens after it"),
    "sees_padding": (with_mlp(PaddingMLP), "padding changes the hidden states of records"),
    "sees_predictors": (with_mlp(PredictorMLP), "predictor tokens change the hidden states of other tokens"),
    "ignores_positions": (
        lambda model: setattr(model.model.rotary_emb, "__class__", PlaceEmbedding),
        "it does not take its positions from the rows",
    ),
    "ignores_masks": (
        lambda model: setattr(model.model, "__class__", OwnMaskModel),
        "it changes the mask before it reaches the attention kernel",
    ),
    "runs_twice": (
        lambda model: setattr(model.model, "__class__", TwiceModel),
        "a forward pass does not run each layer once",
    ),
    "scales_logits": (scale_logits, "its logits are not its last hidden states times a matrix"),
    "deeper_head": (
        lambda model: setattr(model, "lm_head", DeeperHead(model.lm_head, nn.Identity())),
        "its output head is not a linear layer",
    ),
}
"""Changes of a Llama model, and the reasons that they must lead to."""


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused_with_its_reason(name):
    """Change a Llama model at the end of its construction."""
    change, reason = FAULTS[name]

    class FaultyConfig(LlamaConfig):
        model_type = f"faulty_{name}"

    class FaultyForCausalLM(LlamaForCausalLM):
        config_class = FaultyConfig

        def __init__(self, config):
            super().__init__(config)
            change(self)

    AutoModelForCausalLM.register(FaultyConfig, FaultyForCausalLM)
    with pytest.raises(UserError, match=rf"^model\.family: faulty_{name} is not supported, because {reason}"):
        check_model(FaultyConfig(), "auto", "model.family")


REFUSED = {
    "mixtral": "it is a mixture of experts",
    "gpt_oss": "it is a mixture of experts",
    "granite_swa": "it has attention sinks",
    "bert": "its attention is not causal",
    "bloom": "its forward pass does not take position_ids",
    "falcon": "its attention does not go through the common interface",
    "doge": "it changes the mask before it reaches the attention kernel",
    "modernbert-decoder": "its logits are not its last hidden states times a matrix",
    "hrm_text": "HrmTextForCausalLM has 2 lists of layers instead of one",
    "ministral": "it cannot be built with these values",
}


@pytest.mark.parametrize("family", REFUSED)
def test_an_unsuitable_family_is_refused_with_the_reason(family):
    with pytest.raises(UserError, match=rf"{family} is not supported, because {REFUSED[family]}"):
        check_model(AutoConfig.for_model(family), "auto", "model.family")


def test_layers_that_are_skipped_at_random_are_refused(tokenizer):
    shape = {"hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 96, "num_hidden_layers": 2}
    config = build_model_config("opt", shape | {"num_attention_heads": 4, "layerdrop": 0.1}, tokenizer, 64)
    with pytest.raises(UserError, match=r"its training skips layers at random \(layerdrop is above 0\): set it to 0"):
        check_model(config, "auto", "model.shape")


def test_layers_that_carry_a_state_are_refused(tokenizer, tmp_path):
    carried = "layers of linear_attention carry a state from record to record in a row"
    with pytest.raises(UserError, match=rf"^model.shape: layer_types must be .* not linear_attention: {carried}"):
        build_model_config("mamba", {}, tokenizer, 64)
    AutoConfig.for_model("mamba").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^model.init_from: .*config.json: layer_types .*: {carried}"):
        pretrained_config(tmp_path)


def test_learned_positions_beyond_the_row_are_refused(tokenizer):
    shape = {"n_embd": 48, "n_layer": 2, "n_head": 4}
    assert build_model_config("gpt2", shape, tokenizer, 64).n_positions == 64
    with pytest.raises(
        UserError, match=r"is 64, but the model shape allows 32 positions; lower .*, or raise n_positions"
    ):
        build_model_config("gpt2", shape | {"n_positions": 32}, tokenizer, 64)


def test_the_tiny_model_has_each_kind_of_layer_and_the_options_of_the_full_model():
    config = AutoConfig.for_model("gemma3_text", **read("gemma3_text_1b"))
    tiny = tiny_config(config)
    assert tiny.layer_types == ["sliding_attention", "full_attention"] and tiny.sliding_window < 8
    assert (tiny.num_attention_heads, tiny.num_key_value_heads) == (4, 1), "multi-query attention"
    assert tiny.tie_word_embeddings and tiny.rope_parameters == config.rope_parameters
    tiny = tiny_config(AutoConfig.for_model("smollm3", **read("smollm3_3b")))
    assert tiny.no_rope_layers == [1, 0] and tiny.num_attention_heads == 2 * tiny.num_key_value_heads
    tiny = tiny_config(AutoConfig.for_model("olmo3", **read("olmo3_7b")))
    assert tiny.num_attention_heads == tiny.num_key_value_heads
    assert (
        tiny.rope_parameters["full_attention"] | {"original_max_position_embeddings": 8192}
        == (read("olmo3_7b")["rope_parameters"]["full_attention"])
    )
    config = AutoConfig.for_model("qwen3", **read("qwen3_0.6b"))
    tiny = tiny_config(config)
    assert tiny.num_attention_heads * tiny.head_dim != tiny.hidden_size


def test_a_refusal_is_one_line_of_a_dry_run_and_of_a_run(tmp_path):
    model = {"family": "mixtral", "shape": {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}}
    path = write_config(tmp_path, run_config(tmp_path, name="refused", model=model))
    run_command(["python", "-m", "data_prep", str(path)])
    for options in (["--dry-run"], []):
        result = run_command(["python", "launcher/run.py", str(path), *options], check=False)
        assert result.returncode == 2
        errors = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("error")]
        assert len(errors) == 1 and "mixtral is not supported, because it is a mixture of experts" in errors[0]
    assert not list((tmp_path / "runs").glob("*/checkpoints/*"))


def test_a_problem_depends_on_the_values(tokenizer):
    """Qwen2 passes with full attention and with windows; its values decide which mask is needed."""
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    for changes in ({}, windows):
        config = build_model_config("qwen2", shape | changes, tokenizer, 64)
        assert ("sliding_attention" in config.layer_types) == bool(changes)
        assert find_problem(type(config), json.dumps(config.to_dict(), sort_keys=True, default=str), "auto") is None
