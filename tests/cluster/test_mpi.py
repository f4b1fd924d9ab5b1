"""mpirun and DeepSpeed's launchers for MPICH and Open MPI give the same run; jobs that would split into runs stop."""

import shutil
import sys
from pathlib import Path

import pytest

from pretrain.run_folder import read_metrics
from tests.commands import deepspeed_command, free_port, prepare_corpus, run_command, tiny_config, write_config

RUN = "launcher/run.py"
ONE_MACHINE = ["--force_multi", "--no_ssh_check", "--master_addr", "127.0.0.1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a corpus, a hostfile, and a run of DeepSpeed's default launcher."""
    folder = tmp_path_factory.mktemp("mpi")
    (folder / "hostfile").write_text("localhost slots=2\n")
    path = config(folder, "plain")
    prepare_corpus(path)
    run_command(deepspeed_command(2, RUN, path))
    return folder


def config(folder: Path, name: str) -> Path:
    return write_config(folder, tiny_config(folder, name=name, train__steps=2))


def losses(folder: Path, name: str) -> list[float]:
    return [line["loss/total"] for line in read_metrics(folder / "runs" / name)]


def deepspeed(folder: Path, launcher: str, *arguments: str) -> list[str]:
    return [
        str(Path(sys.executable).parent / "deepspeed"),
        "--hostfile",
        str(folder / "hostfile"),
        *ONE_MACHINE,
        "--master_port",
        str(free_port()),
        "--launcher",
        launcher,
        *arguments,
    ]


@pytest.fixture(scope="module")
def open_mpi(tmp_path_factory) -> dict[str, str]:
    """Return environment variables that select Open MPI's mpirun and let mpi4py use its library."""
    mpirun, library = shutil.which("mpirun.openmpi"), next(Path("/usr/lib").glob("*/libmpi.so.40"), None)
    if mpirun is None or library is None or shutil.which("ompi_info") is None:
        pytest.skip("needs the Debian package openmpi-bin")
    folder = tmp_path_factory.mktemp("openmpi")
    (folder / "mpirun").symlink_to(mpirun)
    return {
        "PATH": f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "MPI4PY_MPIABI": "openmpi",
        "MPI4PY_LIBMPI": str(library),
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def test_mpirun_produces_the_same_run(folder):
    run_command(["mpirun", "-n", "2", "python", RUN, str(config(folder, "mpirun"))], MASTER_PORT=str(free_port()))
    assert losses(folder, "mpirun") == losses(folder, "plain")


@pytest.mark.slow
def test_deepspeed_with_mpich_produces_the_same_run(folder):
    run_command([*deepspeed(folder, "mpich"), RUN, str(config(folder, "mpich"))])
    assert losses(folder, "mpich") == losses(folder, "plain")


@pytest.mark.slow
def test_deepspeed_with_open_mpi_produces_the_same_run(folder, open_mpi):
    run_command(
        [
            *deepspeed(folder, "openmpi", "--launcher_args", "--mca btl_tcp_if_include lo"),
            RUN,
            str(config(folder, "openmpi")),
        ],
        **open_mpi,
    )
    assert losses(folder, "openmpi") == losses(folder, "plain")


SPLITTING = {
    "mpirun of a different MPI library": (
        ["python"],
        "2 processes were started together, but MPI sees 1: the launcher belongs to a different MPI library",
    ),
    "a launcher in each process": (
        ["torchrun", "--standalone", "--nproc-per-node", "1"],
        "mpirun or srun started 2 processes, and each would be a separate run",
    ),
}


@pytest.mark.parametrize("case", SPLITTING)
def test_a_job_that_would_split_into_several_runs_stops(folder, open_mpi, case):
    command, message = SPLITTING[case]
    # mpi4py uses the library of Open MPI under the mpirun of MPICH
    library = {name: value for name, value in open_mpi.items() if name.startswith("MPI4PY")}
    completed = run_command(["mpirun", "-n", "2", *command, RUN, str(config(folder, "split"))], check=False, **library)
    assert completed.returncode and f"error: {message}" in " ".join(completed.stderr.split()), completed.stderr[-2000:]
    assert not losses(folder, "split")
