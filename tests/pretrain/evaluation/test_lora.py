"""Finetuning with LoRA adapters and with an objective on pairs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from data_prep.utils.console import UserError
from pretrain.config import load_config, parse_task
from pretrain.evaluation.export import export_checkpoint
from pretrain.models.export import load_language_model
from pretrain.models.lora import add_adapters, merge_adapters
from pretrain.run_folder import step_name
from pretrain.sections import LoraConfig
from pretrain.training.saving import min_checkpoint_bytes
from tests.commands import ROOT, prepare_corpus, ranks_command, run_command, tiny_config, write_config
from tests.families import FAMILIES
from tests.pretrain.evaluation.test_job import read_lines, write_pairs

WITHOUT_PEFT = "there is no package peft (the extra lora)"
LORA = LoraConfig(rank=2, alpha=8)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_have_the_outputs_of_the_adapted_model(make_model, family):
    pytest.importorskip("peft", reason=WITHOUT_PEFT)
    model, plain = make_model(1, family=family), make_model(1, family=family)
    embeddings = torch.randn(2, 7, model.hidden_size)
    before = model.causal_lm.model(inputs_embeds=embeddings).last_hidden_state
    add_adapters(model, LORA)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "predictor.weight" in trained and len(trained) > 8
    assert all("lora_" in name for name in trained - {"predictor.weight"})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted = model.causal_lm.model(inputs_embeds=embeddings).last_hidden_state
    merged = merge_adapters(model.state_dict(), LORA)
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    assert (adapted - before).abs().max() > 0.1
    assert torch.allclose(plain.causal_lm.model(inputs_embeds=embeddings).last_hidden_state, adapted, atol=1e-4)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Train a run of a few steps, write task files, and return their folder."""
    folder = tmp_path_factory.mktemp("lora")
    write_pairs(folder / "train.jsonl", "finetune", 200)
    write_pairs(folder / "test.jsonl", "test", 20)
    task = {
        "name": "nl_rx",
        "finetune": {"steps": 3},
        "finetune_objective": {"name": "llm_jepa"},
        "finetune_lora": {"rank": 2, "alpha": 8},
    }
    config = write_config(folder, tiny_config(folder, evaluation={"tasks": [task]}))
    prepare_corpus(config)
    run_command(["python", "launcher/run.py", str(config)])
    return folder


def load_weights(folder):
    return load_file(folder / "model.safetensors")


def test_adapters_are_trained_under_zero_3_on_two_ranks_and_resumed_and_merged(pretrained):
    pytest.importorskip("peft", reason=WITHOUT_PEFT)
    export = export_checkpoint(pretrained / "runs" / "run", 4)
    config = write_config(
        pretrained,
        tiny_config(
            pretrained,
            name="adapted",
            model={"init_from": str(export), "lora": {"rank": 2, "alpha": 8}},
            objective={"name": "llm_jepa", "predictor_mlp": 24},
            train__steps=6,
            checkpoint={"every": 3},
        ),
    )
    run_command(ranks_command(2, "launcher/run.py", config))
    run_dir = pretrained / "runs" / "adapted"
    result = export_checkpoint(run_dir, 6)
    before, after = load_weights(export), load_weights(result)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if "proj" in key}
    halfway, end = (load_file(export_checkpoint(run_dir, step) / "jepa.safetensors") for step in (3, 6))
    assert len(end) == 5 and not any(torch.equal(halfway[key], end[key]) for key in end), (
        "the predictor embedding and the weights of the objective should be trained"
    )
    model, _ = load_language_model(result, "auto", torch.device("cpu"))
    full_bytes = min_checkpoint_bytes(model)
    add_adapters(model, LORA)
    size = sum(file.stat().st_size for file in (run_dir / "checkpoints" / step_name(6)).iterdir())
    assert min_checkpoint_bytes(model) < min(full_bytes, size), (
        "the estimate should not count optimizer states of frozen weights"
    )
    last = read_lines(run_dir / "metrics.jsonl")[-1]

    for path in (run_dir / "checkpoints" / "step-00000006").iterdir():
        path.unlink()
    (run_dir / "checkpoints" / "step-00000006").rmdir()
    (run_dir / "status.json").unlink()
    export.rename(export.with_name("moved"))  # the checkpoints contain the frozen weights too
    run_command(ranks_command(2, "launcher/run.py", config))
    export.with_name("moved").rename(export)
    again = read_lines(run_dir / "metrics.jsonl")[-1]
    assert again["step"] == 6 and again["loss/total"] == last["loss/total"]


def test_adapters_are_trained_with_any_objective_under_zero_3(pretrained):
    """Without predictor tokens, the input of the first layer would need no gradient."""
    pytest.importorskip("peft", reason=WITHOUT_PEFT)
    export = export_checkpoint(pretrained / "runs" / "run", 4)
    objectives = {
        "next_token": {"name": "next_token"},
        "k0": {"name": "llm_jepa", "predictor_tokens": 0},
        "nitp": {"name": "nitp"},
        "nextlat": {"name": "nextlat"},
    }
    configs = [
        write_config(
            pretrained,
            tiny_config(
                pretrained,
                name=f"adapted-{name}",
                model={"init_from": str(export), "lora": {"rank": 2, "alpha": 8}},
                objective=objective,
                train__steps=4,
                train__learning_rate=3e-2,
                monitor__loggers=[],
            ),
        )
        for name, objective in objectives.items()
    ]
    run_command(ranks_command(2, ROOT / "tests" / "pretrain" / "training" / "several_runs.py", *map(str, configs)))
    for name in objectives:
        lines = read_lines(pretrained / "runs" / f"adapted-{name}" / "metrics.jsonl")
        assert lines[-1]["loss/lm"] < lines[0]["loss/lm"] and all(line["optimizer/grad_norm"] > 0 for line in lines)


def test_a_task_finetunes_with_its_own_objective_and_with_adapters(pretrained):
    pytest.importorskip("peft", reason=WITHOUT_PEFT)
    run_dir = pretrained / "runs" / "run"
    run_command(
        [
            "python",
            "launcher/evaluate.py",
            str(run_dir),
            "--task",
            "nl_rx",
            f"task.train={pretrained / 'train.jsonl'}",
            f"task.test={pretrained / 'test.jsonl'}",
            "task.finetune={steps: 3}",
            "task.finetune_objective={name: llm_jepa, weight: 0.5}",
            "task.finetune_lora={rank: 2, alpha: 8}",
        ]
    )
    result = read_lines(run_dir / "evaluation" / "results.jsonl")[-1]
    assert result["settings"]["finetune_objective"] == {"name": "llm_jepa", "weight": 0.5}
    assert result["settings"]["finetune_lora"] == {"rank": 2, "alpha": 8.0}
    finetuned = run_dir / "evaluation" / "finetune" / "nl_rx-step-00000004"
    config = load_config(finetuned / "config.yaml")
    assert config.model.lora == LORA and config.objective.name == "llm_jepa" and config.data.lm_views == "last"
    assert all("loss/jepa" in line for line in read_lines(finetuned / "metrics.jsonl"))
    assert json.loads((finetuned / "export" / "step-00000003" / "jepa.json").read_text())["objective"]["weight"] == 0.5
    assert not (finetuned / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"finetune_lora": {"rank": 2, "alpha": 4}},
            "finetune_objective and finetune_lora have no effect without finetune",
        ),
        ({"finetune": {}, "finetune_lora": {"rank": 0, "alpha": 4}}, "greater than 0"),
    ],
)
def test_invalid_finetuning_settings_are_refused(changes, expected):
    with pytest.raises(UserError, match=expected):
        parse_task({"name": "nl_rx"} | changes, "task")
