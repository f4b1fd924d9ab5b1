"""Jobs on a real Slurm cluster with one node: preparation, ranks without MPI, and requeueing."""

import json
import sys
from pathlib import Path

import pytest

from pretrain.evaluation.results import read_results
from pretrain.run_folder import list_steps, read_metrics, read_status
from tests.cluster.slurm import missing_requirements, running_cluster
from tests.commands import ROOT, free_port, prepare_corpus, run_command, tiny_config, write_config
from tests.pretrain.training.pause_points import release_file
from tests.processes import contents

pytestmark = pytest.mark.skipif(bool(missing_requirements()), reason=missing_requirements())
SCRIPTS = ROOT / "launcher" / "slurm"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    prepare_corpus(write_config(folder, tiny_config(folder)))
    return folder


def losses(folder: Path, name: str) -> list[tuple]:
    return [(line["step"], line["loss/total"]) for line in read_metrics(folder / "runs" / name)]


def test_preparation_under_srun_writes_the_same_bytes(cluster, folder, tmp_path):
    log = tmp_path / "log"
    config = write_config(tmp_path, tiny_config(tmp_path, data__path=str(tmp_path / "shared")))
    job = cluster.submit(log, "--ntasks=2", SCRIPTS / "prepare.sbatch", config)
    assert cluster.wait_for_job(job, log)["JobState"] == "COMPLETED", log.read_text()
    assert "in 2 MPI ranks" in log.read_text()
    assert contents(tmp_path / "shared") == contents(folder / "corpus")


def test_tasks_without_a_common_mpi_world_are_reported_in_one_line_with_exit_code_2(cluster, tmp_path):
    log = tmp_path / "log"
    config = write_config(tmp_path, tiny_config(tmp_path))
    job = cluster.submit(log, "--ntasks=2", "--export=ALL,SLURM_MPI_TYPE=none", SCRIPTS / "prepare.sbatch", config)
    assert cluster.wait_for_job(job, log)["ExitCode"] == "2:0"
    assert log.read_text().count("error: 2 processes were started together, but MPI sees 1") == 1, log.read_text()
    assert not (tmp_path / "corpus").exists()


@pytest.mark.slow
def test_srun_without_mpi_and_deepspeed_produce_the_same_run_as_torchrun(cluster, folder):
    paths = {
        name: write_config(folder, tiny_config(folder, name=name, train__steps=2))
        for name in ("torchrun", "srun", "deepspeed")
    }
    binaries, hosts = Path(sys.executable).parent, folder / "hosts"
    hosts.write_text("localhost slots=2\n")
    run_command(
        [
            str(binaries / "torchrun"),
            "--nproc-per-node",
            "2",
            "--master-port",
            str(free_port()),
            "launcher/run.py",
            str(paths["torchrun"]),
        ]
    )
    cluster.run_command("srun", "--ntasks=2", "python", "launcher/run.py", paths["srun"])
    cluster.run_command(
        binaries / "deepspeed",
        "--hostfile",
        hosts,
        "--force_multi",
        "--no_ssh_check",
        "--master_addr",
        "127.0.0.1",
        "--launcher",
        "slurm",
        "launcher/run.py",
        paths["deepspeed"],
    )
    assert len(losses(folder, "torchrun")) == 2
    assert losses(folder, "srun") == losses(folder, "deepspeed") == losses(folder, "torchrun")
    assert json.loads((folder / "runs" / "srun" / "environment.json").read_text())["ranks"] == 2


FAKE_RUN = """
import os, signal, sys, time
from pathlib import Path

rank, start = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
outcome = os.environ["OUTCOMES"].split()[start]
print(f"rank {rank} of start {start + 1}: {outcome}", flush=True)
if outcome == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    Path(f"waiting-{rank}").touch()
    time.sleep(3600)
time.sleep(0.5 * rank)
if outcome == "progress" and rank == 0:
    checkpoints = Path("runs/run/checkpoints")
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / "latest").write_text(f"step-{start:08d}")
if outcome == "progress" and rank == 1:
    while not (file := Path("runs/run/checkpoints/latest")).exists() or file.read_text() != f"step-{start:08d}":
        time.sleep(0.05)
if outcome in ("progress", "crash") and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit({"stopped": 75, "mistake": 2}.get(outcome, 0))
"""
"""A stand-in for run.py. OUTCOMES lists the outcome of each start of a job.

The outcomes are wait (until SIGUSR1), crash, progress (crash after a new checkpoint), stopped (exit code 75), mistake
(exit code 2) and finished.
"""


@pytest.fixture
def project(tmp_path):
    """Return a folder to submit jobs from, with the stand-in for run.py."""
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "run.py").write_text(FAKE_RUN)
    write_config(tmp_path, tiny_config(tmp_path, output_dir="runs"))
    return tmp_path


@pytest.mark.parametrize(
    ("outcomes", "starts", "code"),
    [
        (["stopped", "crash", "mistake", "finished"], 3, "2:0"),
        pytest.param(["stopped", "stopped", "stopped", "stopped", "finished"], 5, "0:0", marks=pytest.mark.slow),
        pytest.param(["crash", "crash", "progress", "crash", "crash", "finished"], 5, "137:0", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_or_crashed_job_is_requeued_until_it_makes_no_progress(cluster, project, outcomes, starts, code):
    log = project / "log"
    job = cluster.submit(
        log,
        "--ntasks=2",
        SCRIPTS / "pretrain.sbatch",
        "run.yaml",
        "seed=1",
        folder=project,
        OUTCOMES=" ".join(outcomes),
    )
    job_info = cluster.wait_for_job(job, log)
    assert (int(job_info["Restarts"]) + 1, job_info["ExitCode"]) == (starts, code), log.read_text()
    assert ("giving up" in log.read_text()) == (code == "137:0")


def test_a_configuration_error_ends_the_job_before_any_rank_starts(cluster, project):
    log = project / "log"
    job = cluster.submit(log, "--ntasks=2", SCRIPTS / "pretrain.sbatch", "run.yaml", "sed=1", folder=project)
    assert cluster.wait_for_job(job, log)["ExitCode"] == "2:0"
    printed = log.read_text()
    assert printed.startswith("error: unknown key 'sed' in the command line") and printed.count("\n") == 1, printed


@pytest.mark.slow
def test_the_signal_before_the_time_limit_reaches_the_ranks(cluster, project):
    log = project / "log"
    job = cluster.submit(
        log,
        "--ntasks=2",
        "--time=00:02:00",
        "--signal=USR1@60",
        SCRIPTS / "pretrain.sbatch",
        "run.yaml",
        folder=project,
        OUTCOMES="wait finished",
    )
    job_info = cluster.wait_for_job(job, log)
    assert (job_info["JobState"], job_info["Restarts"], job_info["ExitCode"]) == ("COMPLETED", "1", "0:0"), (
        log.read_text()
    )
    assert {path.name for path in project.glob("waiting-*")} == {"waiting-0", "waiting-1"}


@pytest.mark.slow
def test_a_stopped_run_resumes_after_requeueing_and_is_evaluated_at_its_end(cluster, folder):
    changes = {"train__steps": 150, "evaluation": {"tasks": [{"name": "nl_rx", "test": str(folder / "test.jsonl")}]}}
    (folder / "test.jsonl").write_text(
        "".join(json.dumps({"text": f"lines having {word}", "code": f".*{word}.*"}) + "\n" for word in ("one", "two"))
    )
    uninterrupted, stopped = (
        write_config(folder, tiny_config(folder, name=name, **changes)) for name in ("uninterrupted", "stopped")
    )
    run_dir, log = folder / "runs" / "stopped", folder / "stopped.log"
    site = folder / "site"
    site.mkdir()
    # Python imports this module at startup. It holds the stopped run at step 8.
    (site / "sitecustomize.py").write_text(f"""
import sys
from pathlib import Path

if sys.orig_argv[-2:] == ["launcher/run.py", {str(stopped)!r}]:
    from tests.pretrain.training.pause_points import hold_steps
    hold_steps(Path({str(stopped)!r}), [8])
""")
    job = cluster.submit(log, "--ntasks=2", SCRIPTS / "pretrain.sbatch", stopped, PYTHONPATH=f"{site}:{ROOT}")
    evaluation = cluster.submit(
        folder / "evaluation.log", f"--dependency=afterany:{job}", SCRIPTS / "evaluate.sbatch", run_dir
    )
    cluster.wait(lambda: len(read_metrics(run_dir)) > 5, "steps", log=log)
    cluster.run_command("scancel", "--signal=USR1", job)
    release_file(stopped, 8).touch()
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", "second start", log=log)
    assert read_status(run_dir)["status"] == "resumable" and 5 < list_steps(run_dir / "checkpoints")[-1] < 150
    assert cluster.job(evaluation)["JobState"] == "PENDING"
    job_info = cluster.wait_for_job(job, log)
    assert (job_info["JobState"], job_info["Restarts"]) == ("COMPLETED", "1"), log.read_text()

    run_command(
        [
            str(Path(sys.executable).parent / "torchrun"),
            "--nproc-per-node",
            "2",
            "--master-port",
            str(free_port()),
            "launcher/run.py",
            str(uninterrupted),
        ]
    )
    assert read_status(run_dir)["status"] == "finished" and "SIGUSR1: saving and stopping" in log.read_text()
    assert len(losses(folder, "stopped")) == 150 and losses(folder, "stopped") == losses(folder, "uninterrupted")
    cluster.wait_for_job(evaluation, folder / "evaluation.log")
    assert [(result["step"], result["task"]) for result in read_results(run_dir)] == [(150, "nl_rx")], (
        folder / "evaluation.log"
    ).read_text()
