"""Unit tests of checkpoints in one process: publish, retain, check, find, convert, load, consolidate."""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from data_prep.utils.console import UserError
from data_prep.utils.files import sha256_file
from pretrain.run_folder import PINS, list_steps, step_name
from pretrain.training import checkpoint, checkpoint_loading
from pretrain.training.checkpoint import (
    VerifiedCheckpoint,
    check,
    find_newest,
    manifest_entry,
    prune,
    publish,
)
from pretrain.training.checkpoint_loading import consolidate, load, make_universal
from pretrain.training.distributed import World
from pretrain.training.random_state import random_state, random_state_file_name
from pretrain.training.stop import Stopped
from tests.pretrain.training.rank_threads import run_on_ranks
from tests.processes import wait_for

STATE = {"progress": {"step": 3, "seconds": 0.5}, "name": "für α"}
ALONE = World(0, 1, torch.device("cpu"))


def write_checkpoint(folder: Path, step: int, ranks: int = 2, files: int = 5, state: dict = STATE) -> Path:
    """Publish a checkpoint of small files, and return its folder."""
    temporary = folder / f".{step_name(step)}.tmp"
    temporary.mkdir(parents=True)
    for number in range(files):
        (temporary / f"shard-{number}.pt").write_bytes(bytes([step % 256, number]) * (10 + number))
    publish(temporary, step, ranks, state, {path.name: manifest_entry(path) for path in temporary.iterdir()})
    return folder / step_name(step)


def rewrite_manifest(path: Path, change) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


# publish


def test_a_published_checkpoint_is_complete_and_the_latest(tmp_path):
    path = write_checkpoint(tmp_path, 7)
    assert path == tmp_path / step_name(7)
    assert check(path) is None
    assert (tmp_path / "latest").read_text() == f"{path.name}\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", path.name]
    assert sorted(entry.name for entry in path.iterdir()) == [
        "manifest.json",
        *(f"shard-{number}.pt" for number in range(5)),
    ]
    found = find_newest(tmp_path, ALONE)
    assert found == VerifiedCheckpoint(path, 2, STATE)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert list(manifest["files"]) == sorted(manifest["files"])


def test_publishing_a_step_again_replaces_its_checkpoint(tmp_path):
    write_checkpoint(tmp_path, 7, ranks=3, files=6)
    path = write_checkpoint(tmp_path, 7, ranks=4, files=2)
    assert check(path) is None
    assert len(list(path.glob("*.pt"))) == 2
    assert find_newest(tmp_path, ALONE).ranks == 4


def test_a_checkpoint_is_published_even_if_latest_cannot_be_written(tmp_path):
    (tmp_path / "latest").mkdir()
    assert check(write_checkpoint(tmp_path, 7)) is None


def test_publishing_waits_for_the_files_of_other_nodes(tmp_path):
    temporary = tmp_path / ".step.tmp"
    temporary.mkdir()
    (temporary / "other.pt").write_bytes(b"12")  # the file is visible but not complete yet
    (temporary / "mine.pt").write_bytes(b"1")
    entries = {"mine.pt": manifest_entry(temporary / "mine.pt")}
    (tmp_path / "complete").write_bytes(b"12345")
    entries["other.pt"] = manifest_entry(tmp_path / "complete")
    thread = threading.Timer(0.5, lambda: os.replace(tmp_path / "complete", temporary / "other.pt"))
    started = time.monotonic()
    thread.start()
    publish(temporary, 1, 2, STATE, entries)
    assert time.monotonic() - started > 0.4
    assert check(tmp_path / step_name(1)) is None


@pytest.mark.parametrize("content", [None, b"1234", b"123456"])
def test_publishing_fails_if_a_file_of_a_peer_node_never_appears(tmp_path, monkeypatch, content):
    monkeypatch.setattr(checkpoint, "VISIBILITY_TIMEOUT", 0.3)  # the real timeout of 30 s would slow the test down
    temporary = tmp_path / ".step.tmp"
    temporary.mkdir()
    (temporary / "mine.pt").write_bytes(b"1")
    entries = {"mine.pt": manifest_entry(temporary / "mine.pt"), "other.pt": {"bytes": 5, "sha256": ""}}
    if content:
        (temporary / "other.pt").write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"other.pt of another rank.*all nodes must share output_dir") as caught:
        publish(temporary, 1, 2, STATE, entries)
    assert caught.value.strerror and list_steps(tmp_path) == []


# retain


@pytest.mark.parametrize("keep_every", [None, 4])
def test_a_checkpoint_that_is_pinned_during_its_removal_is_restored(tmp_path, monkeypatch, keep_every):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    (tmp_path / PINS).mkdir()
    replace = os.replace

    def pin_then_replace(source, target):
        if Path(source).name == step_name(1):
            (tmp_path / PINS / step_name(1)).touch()
        replace(source, target)

    monkeypatch.setattr(os, "replace", pin_then_replace)
    assert prune(tmp_path, 1, keep_every) == []
    assert list_steps(tmp_path) == [1, 3]
    assert check(tmp_path / step_name(1)) is None


def test_a_checkpoint_that_cannot_be_moved_is_reported_and_the_remaining_ones_are_removed(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    replace = os.replace

    def refuse_the_first(source, target):
        if Path(source).name == step_name(1):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_the_first)
    assert prune(tmp_path, 1, None) == [f"{step_name(1)} (Permission denied)"]
    assert list_steps(tmp_path) == [1, 3]


def test_a_folder_that_cannot_be_deleted_is_reported(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    rmtree = shutil.rmtree

    def refuse_the_first(path, ignore_errors=False):
        if Path(path).name != f".{step_name(1)}.tmp":
            rmtree(path, ignore_errors)
        elif not ignore_errors:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse_the_first)
    assert prune(tmp_path, 1, None) == [f".{step_name(1)}.tmp"]
    assert list_steps(tmp_path) == [3] and not (tmp_path / f".{step_name(2)}.tmp").exists()


def test_only_the_leftovers_of_killed_saves_are_removed(tmp_path):
    write_checkpoint(tmp_path, 1)
    for name in (f".{step_name(2)}.tmp", "damaged-step-00000001", ".other.tmp"):
        (tmp_path / name).mkdir()
    assert prune(tmp_path, 5, None) == []
    assert {path.name for path in tmp_path.iterdir()} == {"latest", step_name(1), "damaged-step-00000001", ".other.tmp"}


# check


DAMAGES = {
    "manifest missing": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "folder missing": (shutil.rmtree, "manifest.json is missing"),
    "manifest truncated": (lambda path: os.truncate(path / "manifest.json", 300), "manifest.json cannot be read"),
    "manifest of bytes": (
        lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe{}"),
        "manifest.json cannot be read",
    ),
    "manifest a list": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "manifest a number": (lambda path: (path / "manifest.json").write_text("3"), "manifest.json cannot be read"),
    "manifest a folder": (
        lambda path: ((path / "manifest.json").unlink(), (path / "manifest.json").mkdir()),
        "manifest.json cannot be read",
    ),
    "files a list": (
        lambda path: rewrite_manifest(path, lambda manifest: manifest.update(files=[])),
        "manifest.json cannot be read",
    ),
    "no seal": (
        lambda path: rewrite_manifest(path, lambda manifest: manifest.pop("seal")),
        "manifest.json cannot be read",
    ),
    "a different step": (
        lambda path: rewrite_manifest(path, lambda manifest: manifest.update(step=8)),
        "the content of manifest.json has changed",
    ),
    "a different state": (
        lambda path: rewrite_manifest(path, lambda manifest: manifest["state"]["progress"].update(step=4)),
        "the content of manifest.json has changed",
    ),
    "one file less": (
        lambda path: rewrite_manifest(path, lambda manifest: manifest["files"].pop("shard-0.pt")),
        "the content of manifest.json has changed",
    ),
    "shard missing": (lambda path: (path / "shard-3.pt").unlink(), "shard-3.pt is missing"),
    "shard truncated": (lambda path: (path / "shard-3.pt").write_bytes(b"1"), "shard-3.pt has 1 bytes instead of 26"),
    "shard changed": (
        lambda path: (path / "shard-3.pt").write_bytes(b"\0" * 26),
        "the content of shard-3.pt has changed",
    ),
}


@pytest.mark.parametrize(("damage", "problem"), DAMAGES.values(), ids=DAMAGES)
def test_every_damage_is_named(tmp_path, damage, problem):
    path = write_checkpoint(tmp_path, 7)
    damage(path)
    assert check(path) == problem


EARLIER_MANIFEST = """\
{
  "step": 3,
  "ranks": 2,
  "state": {
    "progress": {
      "step": 3,
      "seconds": 0.5
    },
    "name": "run"
  },
  "files": {
    "shard.pt": {
      "bytes": 2,
      "sha256": "6b51d431df5d7f141cbececcf79edf3dd861c3b4069f0b11661a3eefacbba918"
    }
  },
  "seal": "f4a9c3cdd21246adf74e035de5e1cca8884f6c1690268da6673b51e488771ba3"
}
"""
"""The manifest of a checkpoint that an earlier version wrote; its only file contains b"12"."""


def test_a_checkpoint_of_an_earlier_version_stays_valid(tmp_path):
    path = tmp_path / step_name(3)
    path.mkdir()
    (path / "shard.pt").write_bytes(b"12")
    (path / "manifest.json").write_text(EARLIER_MANIFEST)
    assert check(path) is None
    assert find_newest(tmp_path, ALONE) == VerifiedCheckpoint(
        path, 2, {"progress": {"step": 3, "seconds": 0.5}, "name": "run"}
    )


def test_a_manifest_without_files_is_invalid(tmp_path):
    assert check(write_checkpoint(tmp_path, 7, files=0)) == "manifest.json lists no files"


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    path = write_checkpoint(tmp_path, 7)
    (path / "shard-1.pt").unlink()
    (path / "shard-1.pt").symlink_to("shard-1.pt")
    assert check(path).startswith("shard-1.pt cannot be read (Too many levels of symbolic links")


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_each_file_is_checked_by_exactly_one_part(tmp_path, parts):
    path = write_checkpoint(tmp_path, 7)
    files = sorted(path.glob("*.pt"))
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + b"x")
        assert [bool(check(path, part, parts)) for part in range(parts)].count(True) == 1
        file.write_bytes(content)
    assert not any(check(path, part, parts) for part in range(parts))
    for file in files:
        file.unlink()
    assert check(path) == "shard-0.pt is missing", "all files are checked unless a part is requested"


# find_newest


def test_nothing_is_found_in_a_folder_without_checkpoints(tmp_path):
    assert find_newest(tmp_path, ALONE) is None
    assert find_newest(tmp_path / "absent", ALONE) is None


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_ranks_find_the_newest_valid_checkpoint_together_and_set_damaged_ones_aside(tmp_path, ranks, messages):
    for step in (1, 2, 3, 10):
        write_checkpoint(tmp_path, step, state={"step": step})
    (tmp_path / step_name(10) / "shard-4.pt").unlink()
    (tmp_path / step_name(3) / "shard-1.pt").write_bytes(b"")
    (tmp_path / f"damaged-{step_name(3)}").mkdir()
    (tmp_path / f"damaged-{step_name(3)}" / "old").touch()
    found = run_on_ranks(ranks, lambda world: find_newest(tmp_path, world))
    assert found == [VerifiedCheckpoint(tmp_path / step_name(2), 2, {"step": 2})] * ranks
    assert list_steps(tmp_path) == [1, 2]
    for step, problem in ((10, "shard-4.pt is missing"), (3, "shard-1.pt has 0 bytes instead of 22")):
        aside = tmp_path / f"damaged-{step_name(step)}"
        assert (aside / "damage.txt").read_text() == problem + "\n"
        assert (aside / "manifest.json").exists() and not (aside / "old").exists()
        told = [line for line in messages if problem in line and f"{step_name(step)} is corrupt" in line]
        assert len(told) == ranks and all(aside.name in line for line in told)
    assert len(messages) == 2 * ranks + 1, "only the main rank repairs `latest`"
    assert (tmp_path / "latest").read_text() == step_name(2) + "\n"


def test_each_file_is_read_by_one_rank(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path, 1)
    read: list[str] = []
    monkeypatch.setattr(checkpoint, "sha256_file", lambda file: read.append(file.name) or sha256_file(file))
    run_on_ranks(3, lambda world: find_newest(tmp_path, world))
    assert sorted(read) == sorted(file.name for file in path.glob("*.pt"))


def test_all_ranks_check_the_checkpoints_that_the_main_rank_lists(tmp_path):
    # files may appear late in the file system of a peer node
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2)
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / step_name(1), tmp_path / "other" / step_name(1))
    found = run_on_ranks(2, lambda world: find_newest(tmp_path / "other" if world.rank else tmp_path, world))
    assert [result.path.name for result in found] == [step_name(1)] * 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_an_error_if_all_checkpoints_are_damaged(tmp_path, ranks):
    for step in (1, 2):
        (write_checkpoint(tmp_path, step) / "shard-0.pt").unlink()
    for _ in range(2):  # the second call finds the checkpoints that the first one set aside
        for error in run_on_ranks(ranks, lambda world: find_newest(tmp_path, world)):
            assert isinstance(error, UserError) and str(error).startswith(f"every checkpoint in {tmp_path} is corrupt")
    assert list_steps(tmp_path) == []


def test_a_damaged_checkpoint_is_set_aside_even_if_the_reason_cannot_be_written(tmp_path):
    write_checkpoint(tmp_path, 1)
    newest = write_checkpoint(tmp_path, 2)
    (newest / "shard-0.pt").unlink()
    (newest / "damage.txt").mkdir()
    assert find_newest(tmp_path, ALONE).path.name == step_name(1)


LATEST = {
    "right": (b"step-00000002\n", None),
    "right but for spaces": (b" step-00000002 ", None),
    "old": (b"step-00000001\n", "named step-00000001"),
    "empty": (b"", "was empty or missing"),
    "missing": (None, "was empty or missing"),
    "long": (b"x" * 100, f"named {'x' * 40};"),
    "not text": (b"\xff", "named \N{REPLACEMENT CHARACTER};"),
}


@pytest.mark.parametrize(("content", "note"), LATEST.values(), ids=LATEST)
def test_a_wrong_latest_file_is_reported_and_repaired(tmp_path, content, note, messages):
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2)
    latest = tmp_path / "latest"
    if content is None:
        latest.unlink()
    else:
        latest.write_bytes(content)
    assert find_newest(tmp_path, ALONE).path.name == step_name(2)
    assert len(messages) == (note is not None) and all(note in line and step_name(2) in line for line in messages)
    assert latest.read_text().strip() == step_name(2)
    assert note is None or latest.read_text() == step_name(2) + "\n"


def test_a_latest_file_that_cannot_be_repaired_is_not_an_error(tmp_path):
    write_checkpoint(tmp_path, 1)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    assert find_newest(tmp_path, ALONE).path.name == step_name(1)


# a different number of ranks


def test_the_same_number_of_ranks_loads_the_checkpoint_itself(tmp_path, monkeypatch, messages):
    monkeypatch.setattr(checkpoint_loading, "CONVERTER", None)
    found = VerifiedCheckpoint(write_checkpoint(tmp_path, 1, ranks=1), 1, STATE)
    make_universal(found, ALONE, NOT_STOPPED)
    assert found.load_path_for(1) == found.path and messages == []


NOT_STOPPED = SimpleNamespace(received=None)
CONVERSION = """
import os, sys
source, target = (sys.argv[sys.argv.index(option) + 1] for option in ("--input_folder", "--output_folder"))
open({record!r}, "a").write(source + chr(10))
print("progress")
if {writes}:
    os.mkdir(target)
    open(target + "/part", "w").close()
sys.stderr.write({stderr!r})
sys.exit({returncode})
"""
"""Code that replaces the conversion by DeepSpeed; it fails if the target exists."""


def fake_conversion(monkeypatch, record: Path, returncode: int, stderr: str = "", writes: bool = True) -> None:
    """Replace the conversion with a script that exits with `returncode` and may write a converted folder.

    The script appends the path of the folder that it converts to the file `record`.
    """
    code = CONVERSION.format(record=str(record), returncode=returncode, stderr=stderr, writes=writes)
    monkeypatch.setattr(checkpoint_loading, "CONVERTER", ["-c", code])


@pytest.mark.parametrize(("before", "ranks"), [(1, 2), (4, 2), (2, 1)])
def test_the_main_rank_converts_for_a_different_number_of_ranks(tmp_path, monkeypatch, messages, before, ranks):
    fake_conversion(monkeypatch, tmp_path / "converted", 0)
    found = VerifiedCheckpoint(write_checkpoint(tmp_path, 1, ranks=before), before, STATE)
    target = found.load_path_for(ranks)
    assert target.parent == tmp_path and target.name.startswith(".step-") and target.name.endswith(".tmp"), (
        "prune() must be able to find it after a kill"
    )
    target.mkdir()  # left over from a killed process
    assert run_on_ranks(ranks, lambda world: make_universal(found, world, NOT_STOPPED)) == [None] * ranks
    assert (tmp_path / "converted").read_text() == f"{found.path}\n" and (target / "part").exists()
    assert f"was written by {before} rank{'s' if before > 1 else ''}, this run has {ranks}" in messages[0]


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("Traceback\n  No space left \n \n", "No space left"),
        ("", "exit code 3"),
        ("\n", "exit code 3"),
        ("y" * 300, "y" * 200),
    ],
    ids=["error", "nothing", "empty line", "long line"],
)
@pytest.mark.parametrize("writes", [True, False])
def test_a_conversion_that_fails_is_an_error_on_every_rank(tmp_path, monkeypatch, stderr, reason, writes):
    fake_conversion(monkeypatch, tmp_path / "converted", 3, stderr, writes)
    found = VerifiedCheckpoint(write_checkpoint(tmp_path, 1, ranks=1), 1, STATE)
    for error in run_on_ranks(2, lambda world: make_universal(found, world, NOT_STOPPED)):
        assert isinstance(error, UserError) and f"({reason})" in str(error)
    assert not found.load_path_for(2).exists()


class StopOnceStarted:
    """A request to stop that arrives as soon as a file exists."""

    def __init__(self, file: Path):
        self.file = file

    @property
    def received(self) -> signal.Signals | None:
        return signal.SIGTERM if self.file.exists() else None


def test_a_signal_ends_the_conversion_and_its_children_on_every_rank(tmp_path, monkeypatch):
    started = tmp_path / "started"
    code = (
        "import os, subprocess, sys, time; os.mkdir(sys.argv[4]); child = subprocess.Popen(['sleep', '9999']); "
        f"open({str(started)!r} + '.tmp', 'w').write(f'{{child.pid}}'); "
        f"os.rename({str(started)!r} + '.tmp', {str(started)!r}); time.sleep(9999)"
    )
    monkeypatch.setattr(checkpoint_loading, "CONVERTER", ["-c", code])
    found = VerifiedCheckpoint(write_checkpoint(tmp_path, 1, ranks=1), 1, STATE)
    for error in run_on_ranks(2, lambda world: _convert_until_stopped(found, world, StopOnceStarted(started))):
        assert isinstance(error, Stopped)
    assert not found.load_path_for(2).exists()
    wait_for(
        lambda: (
            not psutil.pid_exists(int(started.read_text()))
            or psutil.Process(int(started.read_text())).status() == "zombie"
        )
    )


def _convert_until_stopped(found: VerifiedCheckpoint, world: World, stop: StopOnceStarted) -> Stopped | None:
    try:
        return make_universal(found, world, stop)
    except Stopped as error:
        return error


# load


class Engine:
    """An engine that loads like DeepSpeed 0.19.8.

    After a load from the universal format, all parameter groups have the weight decay of the first one, and all
    parameters share one step counter.
    """

    def __init__(self):
        self.parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
        groups = [
            {"params": self.parameters[:2], "weight_decay": 0.1},
            {"params": self.parameters[2:], "weight_decay": 0.0},
        ]
        inner = torch.optim.AdamW(groups, lr=0.5)
        self.optimizer, self.module = SimpleNamespace(optimizer=inner), torch.nn.ParameterList(self.parameters)
        self.loaded: list[Path] = []

    def load_checkpoint(self, folder: str, tag: str):
        path = Path(folder) / tag
        self.loaded.append(path)
        shared = torch.tensor(5.0)
        universal = tag.startswith(".")
        for parameter in self.parameters:
            self.optimizer.optimizer.state[parameter] = {
                "step": shared if universal else torch.tensor(5.0),
                "exp_avg": torch.zeros(2),
                "exp_avg_sq": torch.ones(2),
            }
        if universal:
            (Path(folder) / "latest_universal").write_text(tag)
            for group in self.optimizer.optimizer.param_groups:
                group |= {"weight_decay": 0.1, "lr": 0.25}
        return path, {}

    def step(self) -> list[torch.Tensor]:
        for parameter in self.parameters:
            parameter.grad = torch.ones(2)
        self.optimizer.optimizer.step()
        return [parameter.detach().clone() for parameter in self.parameters]


@pytest.fixture
def saved(tmp_path) -> tuple[VerifiedCheckpoint, list[float]]:
    """Return a checkpoint of one rank with its random state, and the random numbers drawn next."""
    path = write_checkpoint(tmp_path, 1, ranks=1)
    torch.save(random_state(), path / random_state_file_name(0))
    return VerifiedCheckpoint(path, 1, STATE), draw_numbers()


def draw_numbers() -> list[float]:
    return [random.random(), float(np.random.random()), float(torch.rand(()))]


def test_loading_restores_the_engine_and_the_random_numbers(saved):
    found, numbers = saved
    engine = Engine()
    load(engine, found, ALONE)
    assert engine.loaded == [found.path] and check(found.path) is None
    assert draw_numbers() == numbers


def test_loading_for_a_different_number_of_ranks_keeps_the_settings_and_the_step_counts(saved):
    found, _ = saved
    plain = Engine()
    load(plain, found, ALONE)
    expected = plain.step()

    converted = found.load_path_for(2)
    converted.mkdir()
    engines = [Engine(), Engine()]
    assert run_on_ranks(2, lambda world: load(engines[world.rank], found, world)) == [None, None]
    for engine in engines:
        assert engine.loaded == [converted]
        assert [group["weight_decay"] for group in engine.optimizer.optimizer.param_groups] == [0.1, 0.0]
        assert all(torch.equal(one, other) for one, other in zip(engine.step(), expected, strict=True))
        assert [float(state["step"]) for state in engine.optimizer.optimizer.state.values()] == [6.0] * 3
    assert not converted.exists() and not (found.path.parent / "latest_universal").exists()
    assert check(found.path) is None


def test_frozen_weights_are_loaded_for_a_different_number_of_ranks(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path, 1, ranks=2)
    torch.save(random_state(), path / random_state_file_name(0))
    engine = Engine()
    engine.module.base = torch.nn.Module()
    engine.module.base.register_parameter("weight", torch.nn.Parameter(torch.zeros(2), requires_grad=False))
    engine.module.model = torch.nn.Module()
    engine.module.model.register_parameter("weight", torch.nn.Parameter(torch.zeros(2), requires_grad=False))
    weights = {path: {"weight": torch.tensor([1.0, 2.0]), "base.weight": torch.tensor([3.0, 4.0])}}
    monkeypatch.setattr(checkpoint_loading, "consolidate", weights.__getitem__)
    load(engine, VerifiedCheckpoint(path, 2, STATE), ALONE)
    assert engine.module.model.weight.tolist() == [1, 2] and engine.module.base.weight.tolist() == [3, 4]


def test_loading_succeeds_even_if_the_converted_folder_cannot_be_removed(saved, monkeypatch):
    found, _ = saved
    found.load_path_for(2).mkdir()
    engine = Engine()
    load_checkpoint = engine.load_checkpoint

    def load_without_latest(folder: str, tag: str):
        loaded = load_checkpoint(folder, tag)
        (Path(folder) / "latest_universal").unlink()
        return loaded

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "Permission denied")

    engine.load_checkpoint = load_without_latest
    monkeypatch.setattr(shutil, "rmtree", refuse)
    load(engine, found, SimpleNamespace(rank=0, size=2, is_main=True, barrier=lambda: None))
    assert engine.loaded == [found.load_path_for(2)]


def test_each_rank_continues_with_its_own_random_numbers(saved):
    found, numbers = saved
    torch.manual_seed(9)
    torch.save(random_state(), found.path / random_state_file_name(1))
    second_number = float(torch.rand(()))

    def number_after_load(rank: int) -> float:
        load(
            Engine(),
            VerifiedCheckpoint(found.path, 2, STATE),
            SimpleNamespace(rank=rank, size=2, is_main=rank == 0, barrier=lambda: None),
        )
        return float(torch.rand(()))

    assert number_after_load(1) == second_number and number_after_load(0) == numbers[2]


def test_it_is_an_error_if_the_engine_loads_nothing(saved):
    engine = Engine()
    engine.load_checkpoint = lambda folder, tag: (None, {})
    with pytest.raises(AssertionError, match="did not load"):
        load(engine, saved[0], ALONE)


# consolidate


def test_consolidated_weights_are_named_as_in_the_model_and_nothing_is_printed(tmp_path, monkeypatch, capfd):
    path = write_checkpoint(tmp_path, 7)

    def gather(folder: str, tag: str) -> dict[str, torch.Tensor]:
        sys.stdout.write("progress")
        sys.stderr.write("progress")
        assert Path(folder) / tag == path
        return {"model.model.weight": torch.ones(2), "lm_head.model.": torch.zeros(1)}

    monkeypatch.setattr(checkpoint_loading, "get_fp32_state_dict_from_zero_checkpoint", gather)
    assert list(consolidate(path)) == ["model.weight", "lm_head.model."]
    assert capfd.readouterr() == ("", "")


def test_frozen_weights_come_from_the_state_of_the_module(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    torch.save(
        {"module": {"trained": torch.zeros(2), "frozen": torch.ones(2, dtype=torch.bfloat16)}, "version": Version()},
        temporary / "mp_rank_00_model_states.pt",
    )
    publish(temporary, 1, 2, STATE, {path.name: manifest_entry(path) for path in temporary.iterdir()})
    monkeypatch.setattr(
        checkpoint_loading, "get_fp32_state_dict_from_zero_checkpoint", lambda folder, tag: {"trained": torch.ones(2)}
    )
    state = consolidate(tmp_path / step_name(1))
    assert {key: (value.dtype, value.tolist()) for key, value in state.items()} == {
        key: (torch.float32, [1, 1]) for key in ("trained", "frozen")
    }


class Version:
    """An object that only full unpickling restores, like some objects in the files of DeepSpeed."""


def test_a_damaged_or_missing_checkpoint_is_not_consolidated(tmp_path):
    path = write_checkpoint(tmp_path, 7)
    with pytest.raises(UserError, match=r"step-00000008: the folder does not exist"):
        consolidate(tmp_path / step_name(8))
    (path / "shard-0.pt").unlink()
    with pytest.raises(UserError, match=r"cannot use the checkpoint .*: shard-0.pt is missing"):
        consolidate(path)
