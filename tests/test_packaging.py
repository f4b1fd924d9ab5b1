"""The commands of the wheel work in a fresh environment, outside of the project's folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.commands import ROOT, environment, tiny_config, write_config
from tests.processes import TIMEOUT

COMMANDS = {
    "init",
    "prepare",
    "train",
    "evaluate",
    "study",
    "report",
    "doctor",
    "supervise",
    "generate",
    "search",
    "status",
}


def run(command: list[str | Path], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in run(["git", "ls-files"], cwd=ROOT).splitlines():
        if not name.startswith(("tests/", "docs/studies/")) and (ROOT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*build, "--wheel-dir", folder, folder / "source"])
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_code_configurations_and_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = run(["git", "ls-files", "data_prep", "pretrain", "launcher", "configs"], cwd=ROOT).splitlines()
    assert {name for name in tracked if (ROOT / name).is_file()} <= names
    assert {"data_prep/py.typed", "pretrain/py.typed"} <= names


def test_the_commands_of_an_installed_wheel_prepare_and_train(wheel, tmp_path):
    """The environment of this test has the dependencies; a path file makes them visible in the fresh one."""
    fresh = tmp_path / "fresh"
    run([sys.executable, "-m", "venv", "--without-pip", fresh])
    packages = fresh / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", fresh / "bin" / "python", "install", "--quiet"]
    run([*install, "--no-deps", "--no-index", "--ignore-installed", wheel])
    assert {path.name for path in (fresh / "bin").glob("jepa-*")} == {f"jepa-{name}" for name in COMMANDS}

    config = write_config(tmp_path, tiny_config(tmp_path, train__steps=2, monitor__loggers=[]))
    variables = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    options = {"cwd": tmp_path, "env": variables | {"PATH": f"{fresh / 'bin'}{os.pathsep}{os.environ['PATH']}"}}
    run(["jepa-prepare", config], **options)
    assert "finished at step 2" in run(["jepa-train", config], **options)
    origin = "import pretrain, launcher.study; print(pretrain.__file__, launcher.study.__file__)"
    for path in run([fresh / "bin" / "python", "-c", origin], **options).split():
        assert Path(path).is_relative_to(packages)
