"""Two nodes over pdsh give the same run as one machine. Failures: a dead or disconnected node, a hanging rank."""

import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from pretrain.run_folder import list_steps, read_metrics, read_status
from tests.cluster.nodes import Cluster
from tests.commands import ROOT, deepspeed_command, prepare_corpus, run_command, tiny_config, write_config
from tests.processes import TIMEOUT, wait_for

RUN = ROOT / "launcher" / "run.py"
FORWARDED = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
HANG_SECONDS = 20
"""Value of monitor.hang_seconds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, nodes) -> Path:
    """Return the folder to start the launcher in, with hostfile, `.deepspeed_env` and a prepared corpus."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in FORWARDED.items()))
    prepare_corpus(write_config(folder, tiny_config(folder)))
    return folder


def pdsh_command(config: Path, *overrides: str) -> list[str | Path]:
    return [Path(sys.executable).parent / "deepspeed", "--hostfile", "hostfile", RUN, config, *overrides]


def demo_arguments(folder: Path, name: str) -> list[str | Path]:
    """Return the demo's configuration with overrides for a run of a few steps."""
    return [
        ROOT / "configs" / "demo.yaml",
        f"name={name}",
        f"output_dir={folder / 'runs'}",
        f"data.path={folder / f'corpus-{name}'}",
        "data.sources.0.records=3000",
        "data.sources.1.records=100",
        "train.epochs=null",
        "train.steps=4",
        "monitor.log_every=1",
        "monitor.validate_every=2",
        "evaluation.every=0",
    ]


def losses(run_dir: Path) -> list[dict[str, float]]:
    return [
        {tag: value for tag, value in line.items() if tag.startswith(("loss", "validation", "optimizer"))}
        for line in read_metrics(run_dir)
    ]


@pytest.mark.slow
def test_two_nodes_produce_the_same_corpus_and_run_as_one_machine(nodes: Cluster, folder):
    run_command(["python", "-m", "data_prep", *map(str, demo_arguments(folder, "one"))])
    # UCX must use TCP: it treats the two nodes as one machine, but they have no common shared memory.
    mpirun = [
        "mpirun",
        "-hosts",
        "n1,n2",
        "-ppn",
        "1",
        "-n",
        "2",
        "-launcher",
        "ssh",
        "-launcher-exec",
        folder / "ssh",
        "-genv",
        "UCX_TLS",
        "tcp",
    ]
    (folder / "ssh").symlink_to(nodes.folder / "bin" / "ssh")
    completed = nodes.run_on_control([*mpirun, "python", "-m", "data_prep", *demo_arguments(folder, "two")], cwd=ROOT)
    assert "2 MPI ranks" in completed.stdout
    shards = [
        sorted((path.name, path.read_bytes()) for path in corpus.rglob("*.arrow"))
        for corpus in (folder / "corpus-one", folder / "corpus-two")
    ]
    assert shards[0] == shards[1]

    run_command(deepspeed_command(2, RUN, *demo_arguments(folder, "one")))
    completed = nodes.run_on_control(pdsh_command(*demo_arguments(folder, "two")), cwd=folder)
    assert "finished at step 4" in completed.stdout and "set it in .deepspeed_env" not in completed.stdout
    one, two = (folder / "runs" / name for name in ("one", "two"))
    assert losses(one) == losses(two) and losses(one)
    assert re.search(r"--- .* on n2, ", (two / "logs" / "rank-00001.log").read_text())
    assert "finished at step 4" in (two / "logs" / "rank-00000.log").read_text()


class Run:
    """A long run on both nodes, watched from the control host."""

    def __init__(self, nodes: Cluster, folder: Path, name: str):
        values = tiny_config(
            folder,
            name=name,
            train__steps=100_000,
            checkpoint={"every": 4},
            monitor={"log_every": 1, "hang_seconds": HANG_SECONDS, "loggers": [], "validate_every": 10**6},
        )
        self.path = write_config(folder, values)
        self.run_dir = folder / "runs" / name
        self.log = folder / f"{name}.log"
        self.nodes = nodes
        self.folder = folder

    def start(self) -> None:
        """Start the run, and wait until it has made a new step and has a checkpoint."""
        steps, start_time = len(read_metrics(self.run_dir)), time.monotonic()
        self.process = self.nodes.start_on_control(pdsh_command(self.path), self.log, cwd=self.folder)
        while len(read_metrics(self.run_dir)) <= steps or not list_steps(self.run_dir / "checkpoints"):
            assert self.process.poll() is None and time.monotonic() < start_time + TIMEOUT, self.log.read_text()[-4000:]
            time.sleep(0.1)

    def rank(self, rank: int) -> psutil.Process:
        """Return the process of a rank."""
        return next(
            process
            for process in psutil.process_iter(["cmdline", "environ"])
            if str(self.path) in (process.info["cmdline"] or ())
            and "--local_rank=0" in process.info["cmdline"]
            and process.info["environ"].get("RANK") == str(rank)
        )

    def wait_for_failure(self) -> str:
        """Wait until the command has failed, and return its output."""
        code = self.process.wait(TIMEOUT)
        assert code not in (0, None)
        return self.log.read_text()

    def assert_resumes(self) -> None:
        """Assert that the next start neither repeats nor loses a step, and stop it with a signal to one rank."""
        saved = list_steps(self.run_dir / "checkpoints")[-1]
        self.start()
        assert f"resuming from step {saved}" in self.log.read_text()
        self.rank(1).send_signal(signal.SIGTERM)
        self.process.wait(TIMEOUT)
        assert read_status(self.run_dir)["status"] == "resumable"
        steps = [line["step"] for line in read_metrics(self.run_dir)]
        assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_next_start_resumes(nodes, folder):
    run = Run(nodes, folder, "killed")
    run.start()
    run.rank(1).kill()
    output = run.wait_for_failure()
    assert re.search(r"n1: error: no heartbeat from rank 1 on n2 at step \d+; first noticed by rank 0 on n1", output)
    assert "rank 1 on n2" in read_status(run.run_dir)["reason"]
    run.assert_resumes()


@pytest.mark.slow
@pytest.mark.parametrize(("fail", "repair"), [("kill_node", "start_node"), ("disconnect", "reconnect")])
def test_a_dead_or_disconnected_node_is_named_and_the_next_start_resumes(nodes, folder, fail, repair):
    run = Run(nodes, folder, fail)
    run.start()
    getattr(nodes, fail)("n2")
    output = run.wait_for_failure()
    getattr(nodes, repair)("n2")
    assert re.search(r"n1: error: .*rank 1 on n2 at step \d+", output)
    run.assert_resumes()


@pytest.mark.slow
def test_a_hanging_rank_is_named_and_killed_and_the_next_start_resumes(nodes, folder):
    run = Run(nodes, folder, "stopped")
    run.start()
    stopped = run.rank(1)
    stopped.suspend()
    output = run.wait_for_failure()
    assert re.search(
        r"n1: error: (the run has been hanging for \d+ s: )?rank 1 on n2 at step \d+ (without a|has sent no) heartbeat",
        output,
    )
    wait_for(lambda: not stopped.is_running())
    run.assert_resumes()


@pytest.mark.slow
def test_an_error_of_one_rank_is_shown_last_with_its_rank_and_host(nodes, folder):
    run = Run(nodes, folder, "broken")
    run.start()
    run.rank(1).send_signal(signal.SIGTERM)
    run.process.wait(TIMEOUT)
    site = folder / "sitecustomize.py"
    site.write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    import pretrain.data.batch as batch\n"
        "    def broken(*arguments, **more):\n        raise ZeroDivisionError('a planted mistake')\n"
        "    batch.Batch.to = broken\n"
    )
    try:
        # Only the second start is checked. DeepSpeed adds the working folder to PYTHONPATH in both.
        nodes.run_on_control(pdsh_command(run.path), cwd=folder, check=False)
        completed = nodes.run_on_control(pdsh_command(run.path), cwd=folder, check=False, PYTHONPATH=f"{folder}:{ROOT}")
    finally:
        site.unlink()
    errors = [line for line in (completed.stdout + completed.stderr).splitlines() if "error: " in line]
    assert "error: the first to fail was rank 1 on n2" in errors[-1]
    assert "ZeroDivisionError: a planted mistake" in errors[-1]
