"""A study of a tiny model on a small corpus, which is prepared once."""

import json

import pytest
import yaml

from data_prep.nlrx_grammar import generate
from pretrain.studies.config import load_study
from tests.commands import prepare_corpus, tiny_config, write_config

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with base.yaml and its prepared corpus, which is not decontaminated."""
    folder = tmp_path_factory.mktemp("study")
    pairs = (generate(0, "test", index) for index in range(20))
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"text": text, "code": code}) + "\n" for text, code in pairs)
    )
    config = write_config(
        folder,
        tiny_config(
            folder,
            name="base",
            train__steps=STEPS,
            train__global_batch_rows=8,
            train__micro_batch_rows=4,
            monitor__log_every=5,
            evaluation={"tasks": [{"name": "loss", "test": str(folder / "pairs.jsonl")}]},
        ),
    )
    prepare_corpus(config)
    return folder


@pytest.fixture
def write_study(folder):
    """Return a function that writes a study file; its keyword arguments change keys."""

    def write(**changes):
        values = {
            "name": "two",
            "base": "base.yaml",
            "output_dir": str(folder / "studies"),
            "seeds": [1],
            "matched_by": "tokens",
            "baseline": "plain",
            "metric": {"task": "loss", "name": "lm", "higher_is_better": False},
            "arms": {"plain": {"objective.name": "next_token"}, "jepa": {}},
        } | changes
        path = folder / f"study-{values['name']}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


@pytest.fixture
def make_study(write_study):
    """Return a function that writes a study file and loads it."""
    return lambda **changes: load_study(write_study(**changes), [])
