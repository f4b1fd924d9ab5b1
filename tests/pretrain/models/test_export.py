"""A killed export: the folder of an export is never left incomplete."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest

from pretrain.models.export import write_export


class Killed(BaseException):
    """The process is killed at this point."""


def kill_at(patch, number):
    """Kill the process before folder operation `number` (counted from 0) takes effect, or halfway through a removal.

    The operations are the renamings and removals of folders that exist.
    """
    operations = itertools.count()
    replace, rmtree = os.replace, shutil.rmtree

    def patched_replace(source, target):
        if Path(source).is_dir() and next(operations) == number:
            raise Killed
        replace(source, target)

    def patched_rmtree(path, *arguments, **options):
        if Path(path).is_dir() and next(operations) == number:
            (Path(path) / "model.safetensors").unlink()
            raise Killed
        rmtree(path, *arguments, **options)

    patch.setattr(os, "replace", patched_replace)
    patch.setattr(shutil, "rmtree", patched_rmtree)


def test_a_kill_while_an_export_is_replaced_leaves_a_complete_export(make_model, prepared, tmp_path, monkeypatch):
    model = make_model(1)
    model_folder, folder = tmp_path / "model", tmp_path / "exports" / "step"
    shutil.copytree(prepared / "tokenizer", model_folder)
    model.causal_lm.config.save_pretrained(model_folder)
    folder.parent.mkdir()

    def write(version, state):
        write_export(folder, model_folder, state, {"version": version})

    write(0, model.state_dict())
    complete = {path.name for path in folder.iterdir()}
    for number in itertools.count():
        before = json.loads((folder / "jepa.json").read_text())["version"]
        try:
            with monkeypatch.context() as patch:
                kill_at(patch, number)
                write(before + 1, model.state_dict())
        except Killed:
            with pytest.raises(ValueError, match="missing weights"):
                write(before + 2, {})  # even a failed export restores the previous one
            assert {path.name for path in folder.iterdir()} == complete, f"killed at operation {number}"
            assert json.loads((folder / "jepa.json").read_text())["version"] in (before, before + 1)
        else:
            break
        write(before + 3, model.state_dict())
        assert [path.name for path in folder.parent.iterdir()] == ["step"], f"killed at operation {number}"
    assert number >= 3, "two renamings and one removal replace an export"
