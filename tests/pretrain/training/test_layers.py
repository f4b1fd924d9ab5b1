"""Recomputed and compiled layers: the same losses, fewer activations, and no compilation at every step."""

import json
import os
import shutil

import pytest
import torch

from data_prep.layout import Pairing, make_layout
from pretrain.data.batch import Batch, assemble
from pretrain.data.loader import Loader
from pretrain.models.language_model import LanguageModel, build_model_config, random_causal_lm
from pretrain.training.layers import compile_layers, enable_activation_checkpointing, raise_recompile_limit
from tests.commands import ROOT, prepare_corpus, ranks_command, run_command, tiny_config, write_config

WORKER = ROOT / "tests/pretrain/training/several_runs.py"
WITH_WEIGHTS = ({"name": "nitp"}, {"name": "nextlat", "kl_weight": 0.5})
"""Objectives that have weights and read hidden states of inner layers."""
PARTITIONED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
REPLICATED = {"zero_optimization": {"stage": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    prepare_corpus(write_config(folder, tiny_config(folder)))
    run_command(
        ranks_command(
            2,
            WORKER,
            config_of(folder, "plain"),
            config_of(folder, "recomputed", train__activation_checkpointing=True),
            config_of(folder, "by-module", monitor__gradients_every=10**6),
            *(
                config_of(folder, f"{objective['name']}-{kind}", objective=objective, **changes)
                for objective in WITH_WEIGHTS
                for kind, changes in {
                    "plain": {},
                    "recomputed": {"train__activation_checkpointing": True},
                    "by-module": {"monitor__gradients_every": 10**6},
                }.items()
            ),
        )
    )
    return folder


def config_of(folder, name: str, **changes) -> str:
    """Write the configuration of six steps of two micro batches with a validation in the middle. Return its path."""
    return str(
        write_config(
            folder,
            tiny_config(
                folder,
                **{
                    "name": name,
                    "train__steps": 6,
                    "train__micro_batch_rows": 2,
                    "deepspeed": PARTITIONED,
                    "monitor__validate_every": 3,
                    "monitor__loggers": [],
                }
                | changes,
            ),
        )
    )


def assert_same_losses(folder, one: str, other: str, tolerance: float) -> None:
    tables = [
        [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in (one, other)
    ]
    assert len(tables[0]) == 6
    for first, second in zip(*tables, strict=True):
        for tag in [tag for tag in first if "loss/" in tag or tag == "optimizer/grad_norm"]:
            assert second[tag] == pytest.approx(first[tag], rel=tolerance), (first["step"], tag)


def test_recomputed_layers_give_the_same_losses_and_gradient_norms(folder):
    assert_same_losses(folder, "plain", "recomputed", 1e-6)


def test_completely_gathered_layers_give_the_same_losses_and_gradient_norms(folder):
    # layers are gathered completely unless monitor.gradients_every needs their modules
    assert_same_losses(folder, "plain", "by-module", 1e-6)


@pytest.mark.parametrize("kind", ["recomputed", "by-module"])
@pytest.mark.parametrize("objective", WITH_WEIGHTS, ids=lambda objective: objective["name"])
def test_an_objective_with_weights_and_inner_layers_is_the_same_with_any_execution(folder, objective, kind):
    assert_same_losses(folder, f"{objective['name']}-plain", f"{objective['name']}-{kind}", 1e-6)


@pytest.fixture(scope="module")
def batches(corpus, specials) -> list[Batch]:
    """Return micro batches of the same shape with different numbers of labels and pairs."""
    layout = make_layout("joint", specials, pairing=Pairing(1))
    loader = Loader(corpus, layout, 128, 0, dropout=0.3, epochs=None)
    rows = [loader.next_rows(4) for _ in range(3)]
    assembled = [assemble(each, corpus, layout, specials, 128, int(each.paired.sum())) for each in rows]
    assert (
        len({len(batch.label_index) for batch in assembled}) == len({len(batch.pair_valid) for batch in assembled}) == 3
    )
    return assembled


def kept_bytes(model, batch: Batch) -> int:
    """Return the bytes of activations that a forward pass keeps for the backward pass.

    Parameters are not counted, and each storage is counted once.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # kept alive: otherwise a new storage could reuse its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(batch)
    hidden.sum().backward()
    return sum(storage.nbytes() for storage in kept.values())


def test_recomputed_layers_keep_fewer_activations(make_model, batches):
    model = make_model(1).train()
    before = kept_bytes(model, batches[0])
    gradients = [parameter.grad.clone() for parameter in model.causal_lm.model.parameters()]
    model.zero_grad()
    enable_activation_checkpointing(model)
    # checkpointing also keeps the input of each of the two layers, which the hooks do not see
    inputs_of_layers = 2 * batches[0].token_ids.numel() * model.hidden_size * 4
    assert kept_bytes(model, batches[0]) + inputs_of_layers < before / 4
    assert all(
        torch.equal(parameter.grad, gradient)
        for parameter, gradient in zip(model.causal_lm.model.parameters(), gradients, strict=True)
    )


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses_and_are_compiled_once(folder):
    runs = {
        "compiled": {"train__compile": True},
        "compiled-recomputed": {"train__compile": True, "train__activation_checkpointing": True},
        **{
            f"{objective['name']}-compiled": {"train__compile": True, "objective": objective}
            for objective in WITH_WEIGHTS
        },
        "compiled-replicated": {"train__compile": True, "deepspeed": REPLICATED, "monitor__gradients_every": 3},
    }
    replicated = config_of(folder, "replicated", deepspeed=REPLICATED, monitor__gradients_every=3)
    run_command(
        ranks_command(
            2, WORKER, replicated, *(f"compiled:{config_of(folder, name, **changes)}" for name, changes in runs.items())
        )
    )
    assert_same_losses(folder, "plain", "compiled", 1e-4)
    assert_same_losses(folder, "plain", "compiled-recomputed", 1e-4)
    assert_same_losses(folder, "replicated", "compiled-replicated", 1e-4)
    for objective in WITH_WEIGHTS:
        assert_same_losses(folder, f"{objective['name']}-plain", f"{objective['name']}-compiled", 1e-4)


@pytest.mark.slow
def test_all_layers_share_a_graph_without_breaks(make_model, batches):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model(1).train()
    compile_layers(model)
    for batch in batches:
        model(batch).sum().backward()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


COMPILERS = (os.environ.get("CXX", "c++"), "g++")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler")


@pytest.fixture
def fresh_dynamo():
    """Reset torch._dynamo to the state and the limits of a new process."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield
    torch._dynamo.reset()


@needs_compiler
@pytest.mark.slow
def test_layers_with_more_shapes_than_the_recompile_limit_are_all_compiled(tokenizer, batches, fresh_dynamo, messages):
    shape = {
        "hidden_size": 32,
        "head_dim": 16,
        "num_hidden_layers": 10,
        "num_gqa_groups": 1,
        "qkv_multipliers": [1.0, 1.0],
        "ffn_multipliers": [1.0, 10.0],
        "ffn_dim_divisor": 16,
    }
    torch.manual_seed(0)
    model = LanguageModel(
        random_causal_lm(build_model_config("openelm", shape, tokenizer, 128), "sdpa", torch.float32), 1, "sdpa"
    ).train()
    assert len(set(model.causal_lm.config.ffn_widths)) == 10
    expected = model(batches[0])
    compile_layers(model)
    raise_recompile_limit(model)
    for _ in range(2):
        torch.testing.assert_close(model(batches[0]), expected, rtol=1e-3, atol=1e-3)
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == 10
        and not torch._dynamo.utils.counters["unimplemented"]
    )
    assert messages == []


@needs_compiler
@pytest.mark.slow
def test_uncompiled_layers_are_reported_once(make_model, fresh_dynamo, messages):
    model = make_model(1).eval()
    compile_layers(model)
    raise_recompile_limit(model)
    layer, rotary = model.causal_lm.model.layers[0], model.causal_lm.model.rotary_emb
    with torch.no_grad():
        for length in range(2, 14):
            hidden = torch.randn(1, length, model.hidden_size)
            layer(hidden, position_embeddings=rotary(hidden, torch.arange(length)[None]))
    assert len(messages) == 1 and messages[0].startswith("WARNING: some layers run uncompiled")
    assert "recompile_limit" in messages[0]
