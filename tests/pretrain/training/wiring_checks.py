"""Every option of the configuration reaches the object that it configures.

test_wiring.py runs these tests in a separate process because engines change global state.
"""

import json

import deepspeed
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.layout import Pairing, make_layout
from data_prep.pipeline import prepare
from data_prep.tokenizer import Tokenizer
from pretrain.config import load_config
from pretrain.models.language_model import build_model_config, random_causal_lm
from pretrain.training.distributed import init_world
from pretrain.training.evaluation_requests import single_process_environment
from pretrain.training.schedule import learning_rate
from pretrain.training.setup import set_up
from tests.commands import tiny_config, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wiring")
    prepare(load_config(write_config(folder, tiny_config(folder))).data)
    tokenizer = Tokenizer.load(folder / "corpus" / "tokenizer")
    torch.manual_seed(77)  # before any engine exists, because transformers then partitions new models
    start = random_causal_lm(
        build_model_config("llama", tiny_config(folder)["model"]["shape"], tokenizer, 128), "sdpa", torch.float32
    )
    start.save_pretrained(folder / "start")
    save_file({"predictor.weight": torch.randn(1, 32)}, folder / "start" / "jepa.safetensors")
    return folder


def make_trainer(folder, name, **changes):
    return set_up(
        load_config(write_config(folder, tiny_config(folder, name=name, monitor__loggers=[], **changes))),
        init_world(),
    )


def test_optimizer_schedule_and_precision(folder):
    trainer = make_trainer(
        folder,
        "optimizer",
        objective__predictor_mlp=24,
        train__weight_decay=0.3,
        train__betas=[0.8, 0.9],
        train__gradient_clipping=0.7,
        train__precision="bf16",
        train__steps=2,
    )
    groups = trainer.engine.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0] and {
        tuple(group["betas"]) for group in groups
    } == {(0.8, 0.9)}
    # DeepSpeed flattens the groups in order, so their sizes show which parameters are in which group.
    sizes = {1: 0, 2: 0}
    for parameter in trainer.engine.module.parameters():
        sizes[len(parameter.ds_shape)] += parameter.ds_numel
    assert [sum(param.ds_numel for param in group) for group in trainer.engine.optimizer.fp16_groups] == [
        sizes[2],
        sizes[1],
    ]
    assert any("objective." in name for name, _ in trainer.engine.module.named_parameters())
    assert trainer.engine.gradient_clipping() == 0.7
    assert {parameter.dtype for parameter in trainer.engine.module.parameters()} == {torch.bfloat16}
    assert trainer.engine.optimizer.fp32_partitioned_groups_flat[0].dtype == torch.float32
    trainer.engine.optimizer.param_groups[1]["lr"] = 9.0
    trainer.train()
    assert {group["lr"] for group in groups} == {learning_rate(1, 1, trainer.config.train)}


def test_layout_labels_dropout_and_budget(folder):
    trainer = make_trainer(
        folder,
        "layout",
        objective__layout="independent",
        objective__predictor_tokens=2,
        objective__dropout=0.25,
        data__lm_views="last",
        data__train_end_token=False,
        train__steps=None,
        train__epochs=3,
    )
    assert trainer.loader.layout == make_layout(
        "independent", trainer.specials, pairing=Pairing(2), lm_views="last", train_end_token=False
    )
    assert (trainer.loader.dropout, trainer.loader.epochs, trainer.loader.seed) == (0.25, 3, 3)
    assert trainer.weights == {"lm": 1.0, "jepa": 0.5}


def test_the_weight_schedule_scales_the_training_loss(folder):
    trainer = make_trainer(folder, "scheduled", objective__weight_schedule=[[0.25, 0.2], [1.0, 1.0]])
    assert [trainer.weights["jepa"], trainer.weights["lm"]] == [0.5 * 0.2, 1.0]
    trainer.train()
    lines = [json.loads(line) for line in (folder / "runs" / "scheduled" / "metrics.jsonl").read_text().splitlines()]
    for line, factor in zip(lines, (0.2, 0.2 + 0.8 / 3, 0.2 + 1.6 / 3, 1.0), strict=True):
        assert line["loss/total"] == pytest.approx(line["loss/lm"] + 0.5 * factor * line["loss/jepa"], rel=1e-5)


def test_layers_are_recomputed_and_compiled_only_if_configured(folder):
    plain, changed = (
        make_trainer(folder, "plain"),
        make_trainer(folder, "changed", train__activation_checkpointing=True, train__compile=True),
    )
    for trainer, expected in ((plain, False), (changed, True)):
        model = trainer.engine.module.model.causal_lm
        assert model.is_gradient_checkpointing == expected
        assert all(hasattr(layer.forward, "_torchdynamo_orig_callable") == expected for layer in model.model.layers)


def test_init_from_loads_the_weights(folder):
    trainer = make_trainer(folder, "started", model={"init_from": str(folder / "start")})
    loaded = load_file(folder / "start" / "model.safetensors")
    for name, parameter in trainer.engine.module.model.causal_lm.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            assert torch.equal(parameter, loaded[name]), name
    predictor = trainer.engine.module.model.predictor.weight
    with deepspeed.zero.GatheredParameters(predictor):
        assert torch.equal(predictor, load_file(folder / "start" / "jepa.safetensors")["predictor.weight"])


def test_a_job_started_by_a_rank_is_not_a_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANKING", "kept")
    environment = single_process_environment()
    assert environment["RANKING"] == "kept"
    assert not {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_PORT",
        "SLURM_PROCID",
        "OMPI_COMM_WORLD_RANK",
        "PMI_RANK",
    } & set(environment)
