"""A run records everything that is needed to reproduce it."""

import hashlib
import importlib.metadata
import json
import subprocess

import pytest
import yaml

from data_prep.utils.console import UserError
from pretrain import revision
from pretrain.config import load_config
from pretrain.training import describe
from tests.commands import ROOT, prepare_corpus, ranks_command, run_command, tiny_config, write_config
from tests.pretrain.training.checkpoint_equality import assert_same_checkpoints


def record_environment(tmp_path, write_corpus) -> dict:
    corpus = write_corpus([([5, 6], [7])] * 4)
    config = load_config(write_config(tmp_path, tiny_config(tmp_path, data__path=str(corpus.folder), data__sources=[])))
    config.run_dir.mkdir(parents=True, exist_ok=True)
    describe.record_start(config, corpus.manifest, 2, 0, [])
    return json.loads((config.run_dir / "environment.json").read_text())


def test_a_working_tree_records_its_revision_and_its_lock_file(tmp_path, write_corpus, monkeypatch):
    monkeypatch.setenv("JEPA_REVISION", "of an image")
    monkeypatch.setenv("JEPA_IMAGE", "")
    environment = record_environment(tmp_path, write_corpus)
    if (ROOT / ".git").exists():
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True
        )
        assert environment["revision"] == (found.stdout.strip() or None)
    assert environment["requirements"] == hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()
    assert environment["packages"]["torch"] == importlib.metadata.version("torch")
    assert environment["image"] is None and environment["ranks"] == 2 and environment["cpu_capability"]


def test_an_image_records_the_revision_that_it_was_built_from(tmp_path, write_corpus, monkeypatch):
    monkeypatch.setattr(revision, "ROOT", tmp_path)
    monkeypatch.setenv("JEPA_REVISION", "0123abc")
    monkeypatch.setenv("JEPA_IMAGE", "sha256:4567")
    environment = record_environment(tmp_path, write_corpus)
    assert (environment["revision"], environment["image"]) == ("0123abc", "sha256:4567")


def test_keys_that_did_not_exist_when_a_run_was_started_do_not_count_as_changes(tmp_path, write_corpus):
    corpus = write_corpus([([5, 6], [7])] * 4)
    config = load_config(write_config(tmp_path, tiny_config(tmp_path, data__path=str(corpus.folder), data__sources=[])))
    config.run_dir.mkdir(parents=True)
    describe.record_start(config, corpus.manifest, 2, 0, [])
    recorded = yaml.safe_load((config.run_dir / "config.yaml").read_text())
    del recorded["objective"]["stop_gradient"], recorded["monitor"]["loggers"], recorded["evaluation"]
    recorded["monitor"]["tensorboard"] = True
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(recorded))
    assert describe.check_same_run(config, corpus.manifest, 2) == []
    recorded["objective"]["stop_gradient"] = True
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(recorded))
    with pytest.raises(UserError, match=r"different objective\.stop_gradient \(True, now False\)"):
        describe.check_same_run(config, corpus.manifest, 2)


def test_a_run_is_repeated_bit_for_bit_from_what_it_recorded(tmp_path):
    first, again = tmp_path / "runs" / "run", tmp_path / "runs" / "again"
    path = write_config(tmp_path, tiny_config(tmp_path))
    run_command(["python", "-m", "data_prep", path])
    run_command(ranks_command(2, "launcher/run.py", path))
    changes = [f"data.path={tmp_path / 'second'}", "name=again"]
    run_command(["python", "-m", "data_prep", first / "config.yaml", *changes])
    run_command(ranks_command(2, "launcher/run.py", first / "config.yaml", *changes))
    assert (first / "environment.json").read_bytes() == (again / "environment.json").read_bytes()
    assert_same_checkpoints(*(run / "checkpoints" / "step-00000004" for run in (first, again)))


def test_only_a_start_that_trains_is_recorded(tmp_path):
    path, run = write_config(tmp_path, tiny_config(tmp_path)), tmp_path / "runs" / "run"
    prepare_corpus(path)
    # building the engine refuses this batch size
    run_command(["python", "launcher/run.py", path, "train.micro_batch_rows=3"], check=False)
    assert not (run / "environment.json").exists() and not (run / "config.yaml").exists()
    run_command(ranks_command(2, "launcher/run.py", path))
    before = [(run / file).read_bytes() for file in ("environment.json", "config.yaml", "starts.jsonl")]
    assert "is already finished" in run_command(["python", "launcher/run.py", path, "monitor.log_every=2"]).stdout
    assert [(run / file).read_bytes() for file in ("environment.json", "config.yaml", "starts.jsonl")] == before
    (run / "status.json").unlink()  # without a status, the run starts again at its last step
    run_command(["python", "launcher/run.py", path, "monitor.log_every=2"])
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["ranks"]) for start in starts] == [(0, 2), (4, 1)]
    assert starts[0]["changes"] == [] and "monitor.log_every is 2, was 1" in starts[1]["changes"]
    assert json.loads((run / "environment.json").read_text())["ranks"] == 1


def test_a_corpus_without_write_permission_trains_and_exports(tmp_path):
    path = write_config(tmp_path, tiny_config(tmp_path, train__steps=1))
    prepare_corpus(path)
    tokenizer = tmp_path / "corpus" / "tokenizer"
    for file in tokenizer.iterdir():
        file.chmod(0o444)
    tokenizer.chmod(0o555)
    run_command(["python", "launcher/run.py", path])
    model = tmp_path / "runs" / "run" / "model"
    assert all(path.stat().st_mode & 0o200 for path in (model, *model.iterdir()))
