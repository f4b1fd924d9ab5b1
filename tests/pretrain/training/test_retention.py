"""Old checkpoints are removed unless they are permanent, pinned or impossible to remove."""

import json
import os
import subprocess

import pytest

from pretrain.run_folder import PINS, list_steps, step_name
from pretrain.training.checkpoint import prune


def write_checkpoints(folder, steps):
    for step in steps:
        (folder / step_name(step)).mkdir(parents=True)
        (folder / step_name(step) / "shard.pt").write_bytes(b"x")


def test_the_newest_the_permanent_and_the_pinned_checkpoints_are_kept(tmp_path):
    write_checkpoints(tmp_path, range(1, 11))
    (tmp_path / PINS).mkdir()
    (tmp_path / PINS / step_name(3)).touch()
    assert prune(tmp_path, 2, 4) == []
    assert list_steps(tmp_path) == [3, 4, 8, 9, 10]
    assert not list(tmp_path.glob(".*"))


def test_the_last_checkpoint_before_the_decay_is_kept_and_a_manifest_may_be_unreadable(tmp_path):
    write_checkpoints(tmp_path, range(1, 11))
    for step in range(1, 11):
        manifest = {"state": {"progress": {"step": step}}}
        (tmp_path / step_name(step) / "manifest.json").write_text(json.dumps(manifest) if step != 5 else "{")
    assert prune(tmp_path, 2, None, lambda progress: progress.step <= 5) == []
    assert list_steps(tmp_path) == [4, 9, 10]


@pytest.mark.skipif(os.geteuid() != 0, reason="root is needed to mount a folder that cannot be moved")
def test_a_failed_removal_is_reported_and_other_checkpoints_are_removed(tmp_path):
    write_checkpoints(tmp_path, (1, 2, 3, 4))
    stuck = tmp_path / step_name(2)
    if subprocess.run(["mount", "-t", "tmpfs", "none", stuck], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        failed = prune(tmp_path, 1, None)
        assert len(failed) == 1 and failed[0].startswith(step_name(2))
        assert list_steps(tmp_path) == [2, 4]
    finally:
        subprocess.run(["umount", stuck], check=True)
    assert prune(tmp_path, 1, None) == [] and list_steps(tmp_path) == [4]
