"""The batch scripts for Slurm."""

import shutil
import subprocess

import pytest

from tests.commands import ROOT


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_reports_nothing_for_the_batch_scripts():
    scripts = sorted((ROOT / "launcher" / "slurm").glob("*.sbatch"))
    completed = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert len(scripts) == 3 and completed.returncode == 0, completed.stdout


def test_training_gets_a_signal_before_its_time_limit_and_all_jobs_may_be_requeued():
    folder = ROOT / "launcher" / "slurm"
    assert "#SBATCH --signal=USR1@120\n" in (folder / "pretrain.sbatch").read_text()
    assert all("#SBATCH --requeue\n" in script.read_text() for script in folder.glob("*.sbatch"))


def test_a_job_without_a_configuration_prints_its_usage():
    completed = subprocess.run(
        ["bash", ROOT / "launcher" / "slurm" / "pretrain.sbatch"], capture_output=True, text=True
    )
    assert completed.returncode == 2 and completed.stderr.startswith("usage: sbatch ")
