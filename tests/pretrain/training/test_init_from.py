"""model.init_from accepts only complete models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.make_tokenizer import train
from data_prep.nlrx_grammar import generate
from data_prep.tokenizer import Tokenizer
from pretrain.config import load_config
from pretrain.evaluation.export import export_checkpoint
from pretrain.models.language_model import build_model_config, random_causal_lm
from pretrain.run_folder import step_name
from tests.commands import prepare_corpus, ranks_command, read_complete_lines, run_command, tiny_config, write_config
from tests.pretrain.training.checkpoint_equality import assert_same_checkpoints

LOST = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "lost": (lambda tensors: tensors.pop(LOST), f"lacks tensors of the model in its config.json: {LOST};"),
    "half": (
        lambda tensors: [tensors.pop(name) for name in sorted(tensors)[1:10]],
        "in its config.json: model.layers.0.input_layernorm.weight, ",
    ),
    "added": (
        lambda tensors: tensors.update({"model.extra": torch.zeros(2)}),
        "has tensors that the model in its config.json does not have: model.extra;",
    ),
    "reshaped": (
        lambda tensors: tensors.update({LOST: torch.zeros(3, 3)}),
        f"has tensors whose shapes differ from its config.json: {LOST};",
    ),
}
"""Damages to the weights: a function that changes the tensors, and a part of the error line."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepare a corpus and, in the subfolder `start`, a model for it. Return the folder of both."""
    folder = tmp_path_factory.mktemp("init-from")
    path = write_config(folder, tiny_config(folder))
    prepare_corpus(path)
    config = load_config(path)
    torch.manual_seed(1)
    shape = build_model_config("llama", config.model.shape, Tokenizer.load(folder / "corpus" / "tokenizer"), 128)
    random_causal_lm(shape, "sdpa", torch.float32).save_pretrained(folder / "start")
    return folder


def run_from(folder, name, *, check=True, start="start", **changes):
    values = tiny_config(folder, name=name, model={"init_from": str(folder / start)}, **{"train__steps": 1} | changes)
    return run_command(ranks_command(2, "launcher/run.py", write_config(folder, values)), check=check)


@pytest.mark.parametrize("damage", DAMAGES)
def test_wrong_weights_are_named(folder, damage):
    change, expected = DAMAGES[damage]
    file = folder / "start" / "model.safetensors"
    content = file.read_bytes()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    done = run_from(folder, damage, check=False)
    file.write_bytes(content)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and expected in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_truncated_weights_are_one_error_line(folder):
    file = folder / "start" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    done = run_from(folder, "truncated", check=False)
    file.write_bytes(content)
    assert done.returncode == 2 and done.stderr.count("error: model.init_from: cannot read ") == 1, done.stderr


def test_a_complete_model_trains(folder):
    done = run_from(folder, "complete")
    assert "finished at step 1" in done.stdout and "start has no tokenizer, so it is unknown" in done.stdout


def test_the_tokenizer_of_the_model_must_be_the_one_of_the_corpus(folder):
    copy_start(folder, "same")
    shutil.copytree(folder / "corpus" / "tokenizer", folder / "same", dirs_exist_ok=True)
    spec = json.loads((folder / "same" / "tokenizer.json").read_text())
    # a different version of the library may indent the file differently
    (folder / "same" / "tokenizer.json").write_text(json.dumps(spec, indent=2))
    done = run_from(folder, "of-the-same", start="same")
    assert "finished at step 1" in done.stdout and "tokenizer" not in done.stdout
    copy_start(folder, "other")
    texts = [view[::-1] for index in range(600) for view in generate(0, "train", index)]
    assert train(texts, 400, folder / "other").vocab_size == 400
    done = run_from(folder, "of-another", start="other", check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert f"the tokenizer of {folder / 'other'} differs from the tokenizer of {folder / 'corpus'} (id " in errors[0]
    assert f"prepare the corpus with data.tokenizer.path set to {folder / 'other'}" in errors[0]


def copy_start(folder, name):
    """Copy the model in `start`, for a test that adds a tokenizer to it."""
    shutil.copytree(folder / "start", folder / name)


def test_a_run_resumes_without_its_init_from_folder(folder):
    shutil.copytree(folder / "start", folder / "gone")
    changes = {"train__steps": 4, "checkpoint": {"every": 2}}
    run_from(folder, "moved", start="gone", **changes)
    checkpoints = folder / "runs" / "moved" / "checkpoints"
    (checkpoints / step_name(4)).rename(folder / "expected")
    (folder / "runs" / "moved" / "status.json").unlink()
    shutil.rmtree(folder / "gone")
    assert "finished at step 4" in run_from(folder, "moved", start="gone", **changes).stdout
    assert_same_checkpoints(folder / "expected", checkpoints / step_name(4))
    assert "parameters" in run_command(["python", "launcher/run.py", folder / "moved.yaml", "--dry-run"]).stdout


def test_an_export_continues_with_the_weights_of_its_objective(folder):
    def validation(name: str) -> dict[str, float]:
        last = read_complete_lines(folder / "runs" / name / "metrics.jsonl")[-1]
        return {tag: last[tag] for tag in last if tag.startswith("validation/loss/")}

    changes = {"objective": {"name": "nextlat", "kl_weight": 0.5}, "train__learning_rate": 1e-2}
    run_from(folder, "first", train__steps=4, **changes)
    export = export_checkpoint(folder / "runs" / "first", 4)
    unchanged = {"start": str(export), "train__learning_rate": 1e-12}
    run_from(folder, "next", **changes | unchanged)
    assert validation("next") == pytest.approx(validation("first"), rel=1e-4)
    run_from(folder, "other", **changes | unchanged | {"objective": {"name": "nextlat"}, "seed": 4})
    assert validation("other")["validation/loss/jepa"] == pytest.approx(
        validation("first")["validation/loss/jepa"], rel=1e-4
    )
    # an objective without these weights starts from random ones
    run_from(folder, "fresh", **changes | unchanged | {"objective": {"name": "nitp"}})
    assert validation("fresh")["validation/loss/lm"] == pytest.approx(
        validation("first")["validation/loss/lm"], rel=1e-4
    )


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_rotary_embedding_that_depends_on_the_batch_is_refused(folder, options):
    file = folder / "start" / "config.json"
    original = file.read_text()
    file.write_text(
        json.dumps(
            json.loads(original) | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
        )
    )
    values = tiny_config(folder, name="rotary", model={"init_from": str(folder / "start")}, train__steps=1)
    done = run_command(["python", "launcher/run.py", str(write_config(folder, values)), *options], check=False)
    file.write_text(original)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert (
        done.stderr.count(
            f"error: model.init_from: {file}: rope_type must be one of default, linear, llama3, yarn, not dynamic"
        )
        == 1
    )
