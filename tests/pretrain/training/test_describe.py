"""What a run records of itself, so that someone else can repeat it."""

import hashlib
import importlib.metadata
import json
import subprocess

from pretrain import revision
from pretrain.config import load_config
from pretrain.training import describe
from tests.launching import ROOT, call, ranks_command, tiny_config, write_config
from tests.pretrain.training.same_state import assert_same_checkpoints


def recorded(tmp_path, write_corpus) -> dict:
    corpus = write_corpus([([5, 6], [7])] * 4)
    config = load_config(write_config(tmp_path, tiny_config(tmp_path, data__path=str(corpus.folder), data__sources=[])))
    describe.describe_run(config, corpus.manifest, 2)
    return json.loads((config.run_dir / "environment.json").read_text())


def test_a_working_tree_tells_its_revision_and_its_lock_file(tmp_path, write_corpus, monkeypatch):
    monkeypatch.setenv("JEPA_REVISION", "of an image")
    monkeypatch.setenv("JEPA_IMAGE", "")
    environment = recorded(tmp_path, write_corpus)
    if (ROOT / ".git").exists():
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True)
        assert environment["revision"] == (found.stdout.strip() or None)
    assert environment["requirements"] == hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()
    assert environment["packages"]["torch"] == importlib.metadata.version("torch")
    assert environment["image"] is None and environment["ranks"] == 2 and environment["cpu_capability"]


def test_an_image_has_no_working_tree_and_tells_what_it_was_built_from(tmp_path, write_corpus, monkeypatch):
    monkeypatch.setattr(revision, "ROOT", tmp_path)
    monkeypatch.setenv("JEPA_REVISION", "0123abc")
    monkeypatch.setenv("JEPA_IMAGE", "sha256:4567")
    environment = recorded(tmp_path, write_corpus)
    assert (environment["revision"], environment["image"]) == ("0123abc", "sha256:4567")


def test_a_run_is_repeated_bit_for_bit_from_what_it_recorded(tmp_path):
    first, again = tmp_path / "runs" / "run", tmp_path / "runs" / "again"
    path = write_config(tmp_path, tiny_config(tmp_path))
    call(["python", "-m", "data_prep", path])
    call(ranks_command(2, "launcher/run.py", path))
    changes = [f"data.path={tmp_path / 'second'}", "name=again"]
    call(["python", "-m", "data_prep", first / "config.yaml", *changes])
    call(ranks_command(2, "launcher/run.py", first / "config.yaml", *changes))
    assert (first / "environment.json").read_bytes() == (again / "environment.json").read_bytes()
    assert_same_checkpoints(*(run / "checkpoints" / "step-00000004" for run in (first, again)))
