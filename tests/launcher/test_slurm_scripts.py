"""The batch scripts of Slurm are sound shell."""

import shutil
import subprocess

import pytest

from tests.launching import ROOT


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="there is no shellcheck (package shellcheck)")
def test_shellcheck_finds_nothing_in_the_batch_scripts():
    scripts = sorted((ROOT / "launcher" / "slurm").glob("*.sbatch"))
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert len(scripts) == 3 and done.returncode == 0, done.stdout
