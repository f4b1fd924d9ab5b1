"""The batch scripts of Slurm are sound shell."""

import shutil
import subprocess

import pytest

from tests.commands import ROOT


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="there is no shellcheck (package shellcheck)")
def test_shellcheck_finds_nothing_in_the_batch_scripts():
    scripts = sorted((ROOT / "launcher" / "slurm").glob("*.sbatch"))
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert len(scripts) == 3 and done.returncode == 0, done.stdout


def test_training_is_warned_before_its_time_limit_and_all_jobs_may_be_queued_again():
    folder = ROOT / "launcher" / "slurm"
    assert "#SBATCH --signal=USR1@120\n" in (folder / "pretrain.sbatch").read_text()
    assert all("#SBATCH --requeue\n" in script.read_text() for script in folder.glob("*.sbatch"))


def test_a_job_without_a_configuration_says_how_to_submit_it():
    done = subprocess.run(["bash", ROOT / "launcher" / "slurm" / "pretrain.sbatch"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch ")
