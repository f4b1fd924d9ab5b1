"""Each family has its own initialization, which ZeRO-3 keeps the same on any number of ranks."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pretrain.models.language_model import build_model_config, random_causal_lm
from tests.commands import ROOT, ranks_command, run_command, tiny_config, write_config
from tests.families import FAMILIES

WORKER = ROOT / "tests/pretrain/models/initial_weights.py"
LARGE = 500
"""Number of values from which a standard deviation is measured to 3%."""


def shape(family):
    return yaml.safe_load((ROOT / "configs/models" / f"{family}_tiny.yaml").read_text())


@pytest.fixture(scope="module")
def folder(prepared, tmp_path_factory):
    """Return the folder with initial weights: each family on one rank and on two, and one family in bf16."""
    folder = tmp_path_factory.mktemp("initial-weights")
    for ranks, more in ((1, [("gemma2", "bf16")]), (2, [])):
        configs = [
            write_config(
                folder,
                tiny_config(
                    folder,
                    name=f"{family}-{precision}-r{ranks}",
                    data__path=str(prepared),
                    data__sources=[],
                    data__tokenizer={"vocab_size": 512},
                    model={"family": family, "shape": shape(family)},
                    objective__predictor_tokens=12,
                    objective__predictor_mlp=24,
                    train__precision=precision,
                ),
            )
            for family, precision in (*((family, "fp32") for family in FAMILIES), *more)
        ]
        run_command(
            ["python", str(WORKER), *map(str, configs)] if ranks == 1 else ranks_command(ranks, WORKER, *configs)
        )
    return folder


def load_initial(folder, name, rank=0):
    return load_file(folder / "runs" / name / f"initial-{rank}.safetensors")


def create_plain(tokenizer, family):
    """Return the configuration, parameters and buffers that transformers creates for the family without DeepSpeed."""
    torch.manual_seed(9)
    config = build_model_config(family, shape(family), tokenizer, 128)
    model = random_causal_lm(config, "eager", torch.float32)
    return config, {name: value.detach() for name, value in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights_are_the_same_on_any_number_of_ranks(folder, family):
    one = load_initial(folder, f"{family}-fp32-r1")
    for rank in (0, 1):
        other = load_initial(folder, f"{family}-fp32-r2", rank)
        assert other.keys() == one.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("family", FAMILIES)
def test_each_weight_has_the_standard_deviation_of_its_family(folder, tokenizer, family):
    state = load_initial(folder, f"{family}-fp32-r1")
    config, parameters, buffers = create_plain(tokenizer, family)
    layers = {
        name: state.pop(f"objective.predictor.layers.{name}") for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    for name, started in layers.items():  # torch's default: uniform up to the inverse root of the number of inputs
        inputs = config.hidden_size if name.startswith("0.") else 24
        assert 0.8 < started.abs().max() * inputs**0.5 <= 1, name
    assert state.keys() == {f"causal_lm.{name}" for name in (*parameters, *buffers)} | {"predictor.weight"}
    for name, expected in parameters.items():
        started = state[f"causal_lm.{name}"]
        assert started.shape == expected.shape
        if expected.unique().numel() == 1:
            assert torch.equal(started, expected), f"{name}: norms start at one, or at zero in Gemma, which adds one"
        else:
            assert expected.numel() >= LARGE
            assert (
                started.std() == pytest.approx(expected.std().item(), rel=0.15)
                and abs(started.mean()) < 0.15 * expected.std()
            ), name
            assert not torch.equal(started, expected)
    for name, expected in buffers.items():
        assert torch.equal(state[f"causal_lm.{name}"], expected), name
    word_embeddings = parameters["model.embed_tokens.weight"]
    assert state["predictor.weight"].numel() >= LARGE
    assert state["predictor.weight"].std() == pytest.approx(word_embeddings.std().item(), rel=0.15)
    assert word_embeddings.std() == pytest.approx(config.hidden_size**-0.5 if family == "openelm" else 0.02, rel=0.05)


def test_rotary_frequencies_are_not_rounded_in_bf16(folder, tokenizer):
    """Rounded frequencies would turn distant positions by whole radians, and an export would not be rounded."""
    state = load_initial(folder, "gemma2-bf16-r1")
    assert {value.dtype for name, value in state.items() if name.endswith("weight")} == {torch.bfloat16}
    _, _, buffers = create_plain(tokenizer, "gemma2")
    for name in ("model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"):
        assert torch.equal(state[f"causal_lm.{name}"], buffers[name]), name
