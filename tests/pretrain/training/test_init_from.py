"""model.init_from takes complete models alone."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.tokenizer import Tokenizer
from pretrain.config import load_config
from pretrain.models.language_model import random_causal_lm, shape_config
from tests.launching import call, prepare_corpus, ranks_command, tiny_config, write_config

LOST = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "lost": (lambda tensors: tensors.pop(LOST), f"lacks tensors of the model in its config.json: {LOST};"),
    "half": (lambda tensors: [tensors.pop(name) for name in sorted(tensors)[1:10]], "in its config.json: model.layers.0.input_layernorm.weight, "),
    "added": (lambda tensors: tensors.update({"model.extra": torch.zeros(2)}),
              "has tensors that the model in its config.json does not have: model.extra;"),
    "reshaped": (lambda tensors: tensors.update({LOST: torch.zeros(3, 3)}), f"has tensors in another shape than its config.json says: {LOST};"),
}
"""What is done to the weights, and what the error line says."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared corpus and, in `start`, a model for it."""
    folder = tmp_path_factory.mktemp("init-from")
    path = write_config(folder, tiny_config(folder))
    prepare_corpus(path)
    config = load_config(path)
    torch.manual_seed(1)
    shape = shape_config("llama", config.model.shape, Tokenizer.load(folder / "corpus" / "tokenizer"), 128)
    random_causal_lm(shape, "sdpa", torch.float32).save_pretrained(folder / "start")
    return folder


def started(folder, name, *, check=True):
    values = tiny_config(folder, name=name, model={"init_from": str(folder / "start")}, train__steps=1)
    return call(ranks_command(2, "launcher/run.py", write_config(folder, values)), check=check)


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_are_not_those_of_the_model_are_named(folder, damage):
    change, expected = DAMAGES[damage]
    file = folder / "start" / "model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    done = started(folder, damage, check=False)
    file.write_bytes(whole)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and expected in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_truncated_weights_are_one_line(folder):
    file = folder / "start" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    done = started(folder, "truncated", check=False)
    file.write_bytes(whole)
    assert done.returncode == 2 and done.stderr.count("error: model.init_from: cannot read ") == 1, done.stderr


def test_a_complete_model_trains(folder):
    assert "finished at step 1" in started(folder, "complete").stdout
