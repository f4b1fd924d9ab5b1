"""OpenELM, compared with the paper (arXiv 2404.14619), the published configurations and a forward pass in loops."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pretrain.models.openelm import OpenELMConfig, OpenELMForCausalLM
from tests.commands import ROOT, environment

TINY = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "head_dim": 4,
    "num_gqa_groups": 2,
    "ffn_dim_divisor": 8,
    "ffn_multipliers": [0.5, 2.0],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def run_lengths(*counted):
    """Return a list decoded from run lengths: (3, 5), (4, 7) -> three fives and four sevens."""
    return [value for count, value in counted for _ in range(count)]


# Each entry: (width, layers, head width), query heads, feed-forward widths, parameters with a vocabulary of 32,000.
PUBLISHED = {
    "270M": (
        (1280, 16, 64),
        run_lengths((5, 12), (7, 16), (4, 20)),
        [768, 1024, 1280, 1536, 1792, 2048, 2560, 2816, 3072, 3328, 3584, 3840, 4352, 4608, 4864, 5120],
        271_527_168,
    ),
    "450M": (
        (1536, 20, 64),
        run_lengths((3, 12), (7, 16), (6, 20), (4, 24)),
        [
            768,
            1024,
            1280,
            1536,
            1792,
            2304,
            2560,
            2816,
            3072,
            3328,
            3584,
            3840,
            4096,
            4352,
            4608,
            5120,
            5376,
            5632,
            5888,
            6144,
        ],
        457_179_136,
    ),
    "1.1B": (
        (2048, 28, 64),
        run_lengths((3, 16), (7, 20), (8, 24), (6, 28), (4, 32)),
        [
            1024,
            1280,
            1536,
            1792,
            2048,
            2304,
            2560,
            2816,
            3072,
            3328,
            3584,
            3840,
            4096,
            4608,
            4608,
            5120,
            5376,
            5632,
            5888,
            6144,
            6400,
            6656,
            6912,
            7168,
            7424,
            7680,
            7936,
            8192,
        ],
        1_079_891_456,
    ),
    "3B": (
        (3072, 36, 128),
        run_lengths((4, 12), (14, 16), (12, 20), (6, 24)),
        [
            1536,
            1792,
            2048,
            2560,
            2816,
            3072,
            3328,
            3584,
            4096,
            4352,
            4608,
            4864,
            5120,
            5632,
            5888,
            6144,
            6400,
            6656,
            7168,
            7424,
            7680,
            7936,
            8192,
            8704,
            8960,
            9216,
            9472,
            9728,
            10240,
            10496,
            10752,
            11008,
            11264,
            11776,
            12032,
            12288,
        ],
        3_036_647_424,
    ),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return amplify(OpenELMForCausalLM(OpenELMConfig(**TINY)).eval())


def amplify(model, factor=3.0):
    """Enlarge the weights and shift the norms, to make any mistake visible in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor) if parameter.dim() > 1 else parameter.add_(torch.rand_like(parameter))
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_scale_as_published(name):
    (width, layers, head), query_heads, ffn_widths, parameters = PUBLISHED[name]
    config = OpenELMConfig(hidden_size=width, num_hidden_layers=layers, head_dim=head)
    assert (config.query_heads, config.ffn_widths) == (query_heads, ffn_widths)
    assert config.key_value_heads == [heads // 4 for heads in query_heads]
    with torch.device("meta"):
        model = OpenELMForCausalLM(config)
    counted = 32000 * width + width  # the embedding, which is also the output head, and the last norm
    for layer, heads, ffn in zip(model.model.layers, query_heads, ffn_widths, strict=True):
        query, shared = heads * head, heads // 4 * head
        shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        assert shapes == {
            "attention.q_proj.weight": (query, width),
            "attention.k_proj.weight": (shared, width),
            "attention.v_proj.weight": (shared, width),
            "attention.o_proj.weight": (width, query),
            "attention.q_norm.weight": (head,),
            "attention.k_norm.weight": (head,),
            "ffn.gate_proj.weight": (ffn, width),
            "ffn.up_proj.weight": (ffn, width),
            "ffn.down_proj.weight": (width, ffn),
            "attention_norm.weight": (width,),
            "ffn_norm.weight": (width,),
        }
        counted += 2 * (query + shared) * width + 3 * ffn * width + 2 * head + 2 * width
    assert sum(parameter.numel() for parameter in model.parameters()) == counted == parameters


def norm(x, weight):
    return x / math.sqrt(sum(value * value for value in x) / len(x) + 1e-6) * weight


def rotate(x, position):
    """Return x after RoPE: elements i of both halves are rotated by position / 10000^(2 i / width) radians."""
    half, turned = len(x) // 2, np.zeros_like(x)
    for i in range(half):
        angle = position / 10000 ** (2 * i / len(x))
        turned[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        turned[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return turned


def attention(weights, prefix, inputs, head_dim):
    heads, key_value_heads = (len(weights[f"{prefix}.{name}_proj.weight"]) // head_dim for name in ("q", "k"))
    keys, values, outputs = [], [], []
    for position, x in enumerate(inputs):
        query, key, value = (
            (weights[f"{prefix}.{name}_proj.weight"] @ x).reshape(-1, head_dim) for name in ("q", "k", "v")
        )
        keys.append(
            [rotate(norm(key[head], weights[f"{prefix}.k_norm.weight"]), position) for head in range(key_value_heads)]
        )
        values.append(value)
        joined = []
        for head in range(heads):
            rotated_query = rotate(norm(query[head], weights[f"{prefix}.q_norm.weight"]), position)
            group = head // (heads // key_value_heads)
            scores = [
                math.exp(rotated_query @ keys[earlier][group] / math.sqrt(head_dim)) for earlier in range(position + 1)
            ]
            joined.append(sum(score * values[earlier][group] for earlier, score in enumerate(scores)) / sum(scores))
        outputs.append(weights[f"{prefix}.o_proj.weight"] @ np.concatenate(joined))
    return outputs


def feed_forward(weights, prefix, x):
    gate = weights[f"{prefix}.gate_proj.weight"] @ x
    return weights[f"{prefix}.down_proj.weight"] @ (
        gate / (1 + np.exp(-gate)) * (weights[f"{prefix}.up_proj.weight"] @ x)
    )


def logits_in_loops(model, tokens):
    """Return the logits by section 2.1 of the paper, in double precision: (L, V)."""
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    states = [weights["model.embed_tokens.weight"][token] for token in tokens]
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        normed = [norm(x, weights[f"{prefix}.attention_norm.weight"]) for x in states]
        states = [
            x + y
            for x, y in zip(
                states, attention(weights, f"{prefix}.attention", normed, model.config.head_dim), strict=True
            )
        ]
        states = [
            x + feed_forward(weights, f"{prefix}.ffn", norm(x, weights[f"{prefix}.ffn_norm.weight"])) for x in states
        ]
    return np.stack([weights["model.embed_tokens.weight"] @ norm(x, weights["model.norm.weight"]) for x in states])


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_logits_equal_a_forward_pass_in_loops(model, kernel):
    model.set_attn_implementation(kernel)
    tokens = torch.randint(3, 61, (17,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.double()(tokens[None]).logits[0]
    # The tolerance fits fp32, because the model computes norms and angles in fp32.
    np.testing.assert_allclose(logits, logits_in_loops(model, tokens.tolist()), rtol=1e-5, atol=1e-4)
    assert len({layer.attention.q_proj.out_features for layer in model.model.layers}) > 1


def test_generation_is_the_same_with_a_cache_and_with_left_padding(model):
    prompts = [[5, 9, 30, 12, 44], [7, 8]]
    ids = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])
    mask = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    settings = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": [2]}
    cached = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **settings))
    for row, prompt in enumerate(prompts):
        alone = list(prompt)
        for _ in range(12):  # with full forward passes, without generate
            with torch.no_grad():
                logits = model(torch.tensor([alone])).logits[0, -1]
            logits[2] = -torch.inf
            alone.append(int(logits.argmax()))
        assert cached[row, 5 - len(prompt) :].tolist() == alone
    assert len(set(cached[0, 5:].tolist())) > 3


def test_cached_steps_have_the_same_logits(model):
    ids = torch.randint(3, 61, (2, 9))
    with torch.no_grad():
        full = model(ids).logits
        before = model(ids[:, :6], use_cache=True)
        after = model(ids[:, 6:], past_key_values=before.past_key_values)
    torch.testing.assert_close(torch.cat([before.logits, after.logits], dim=1), full, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(model):
    ids = torch.randint(3, 61, (2, 9))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_initialization_equals_corenet():
    width, layers = 256, 3
    model = OpenELMForCausalLM(OpenELMConfig(hidden_size=width, num_hidden_layers=layers, vocab_size=512))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert parameter.std().item() == pytest.approx(
                width**-0.5 * ((2 * layers) ** -0.5 if residual else 1), rel=0.02
            ), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_saved_model_loads_if_only_this_module_is_imported(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors"), "the output head is tied"
    program = (
        "import sys, torch, pretrain.models.openelm; from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "torch.save(model(torch.arange(3, 20)[None]).logits.detach(), sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(tmp_path / "logits.pt")],
        cwd=ROOT,
        env=environment(),
        check=True,
    )
    with torch.no_grad():
        expected = model(torch.arange(3, 20)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")(torch.arange(3, 20)[None]).logits,
        expected,
    )
