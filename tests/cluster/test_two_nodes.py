"""The same run on two nodes over pdsh as on one machine; and what follows when a node dies, is cut off, or a rank stands still."""

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
HANG = 20
"""monitor.hang_seconds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, nodes) -> Path:
    """Where the launcher is started: hostfile, `.deepspeed_env`, and a corpus that one machine has prepared."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in FORWARDED.items()))
    prepare_corpus(write_config(folder, tiny_config(folder)))
    return folder


def over_pdsh(config: Path, *overrides: str) -> list[str | Path]:
    return [Path(sys.executable).parent / "deepspeed", "--hostfile", "hostfile", RUN, config, *overrides]


def demo(folder: Path, name: str) -> list[str | Path]:
    """The demo's configuration, cut to a few steps."""
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
def test_two_nodes_prepare_and_train_as_one_machine_does(nodes: Cluster, folder):
    run_command(["python", "-m", "data_prep", *map(str, demo(folder, "one"))])
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
    ]  # two nodes on one machine have no memory in common, though they look so
    (folder / "ssh").symlink_to(nodes.folder / "bin" / "ssh")
    done = nodes.run_on_control([*mpirun, "python", "-m", "data_prep", *demo(folder, "two")], cwd=ROOT)
    assert "2 MPI ranks" in done.stdout
    shards = [
        sorted((path.name, path.read_bytes()) for path in corpus.rglob("*.arrow"))
        for corpus in (folder / "corpus-one", folder / "corpus-two")
    ]
    assert shards[0] == shards[1]

    run_command(deepspeed_command(2, RUN, *demo(folder, "one")))
    done = nodes.run_on_control(over_pdsh(*demo(folder, "two")), cwd=folder)
    assert "finished at step 4" in done.stdout and "write it into .deepspeed_env" not in done.stdout
    one, two = (folder / "runs" / name for name in ("one", "two"))
    assert losses(one) == losses(two) and losses(one)
    assert re.search(r"--- .* on n2, ", (two / "logs" / "rank-00001.log").read_text())
    assert "finished at step 4" in (two / "logs" / "rank-00000.log").read_text()


class Run:
    """A run on both nodes that would take long, watched from the control host."""

    def __init__(self, nodes: Cluster, folder: Path, name: str):
        values = tiny_config(
            folder,
            name=name,
            train__steps=100_000,
            checkpoint={"every": 4},
            monitor={"log_every": 1, "hang_seconds": HANG, "tensorboard": False, "validate_every": 10**6},
        )
        self.path, self.run_dir, self.log = write_config(folder, values), folder / "runs" / name, folder / f"{name}.log"
        self.nodes, self.folder = nodes, folder

    def start(self) -> None:
        """Start it, and wait until it has made a step of its own."""
        steps, begun = len(read_metrics(self.run_dir)), time.monotonic()
        self.process = self.nodes.start_on_control(over_pdsh(self.path), self.log, cwd=self.folder)
        while len(read_metrics(self.run_dir)) <= steps or not list_steps(self.run_dir / "checkpoints"):
            assert self.process.poll() is None and time.monotonic() < begun + TIMEOUT, self.log.read_text()[-4000:]
            time.sleep(0.1)

    def rank(self, rank: int) -> psutil.Process:
        """The process that trains."""
        return next(
            process
            for process in psutil.process_iter(["cmdline", "environ"])
            if str(self.path) in (process.info["cmdline"] or ())
            and "--local_rank=0" in process.info["cmdline"]
            and process.info["environ"].get("RANK") == str(rank)
        )

    def ends(self) -> str:
        """What the command has printed, once it has ended, with an error."""
        code = self.process.wait(TIMEOUT)
        assert code not in (0, None)
        return self.log.read_text()

    def goes_on(self) -> None:
        """The next start resumes; then a signal to one rank stops it."""
        saved = list_steps(self.run_dir / "checkpoints")[-1]
        self.start()
        assert f"going on from step {saved}" in self.log.read_text()
        self.rank(1).send_signal(signal.SIGTERM)
        self.process.wait(TIMEOUT)
        assert read_status(self.run_dir)["status"] == "resumable"
        steps = [line["step"] for line in read_metrics(self.run_dir)]
        assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_and_the_next_start_resumes(nodes, folder):
    run = Run(nodes, folder, "killed")
    run.start()
    run.rank(1).kill()
    printed = run.ends()
    assert re.search(
        r"n1: error: without a sign of life: rank 1 on n2 at step \d+; the first to notice was rank 0 on n1", printed
    )
    assert "rank 1 on n2" in read_status(run.run_dir)["reason"]
    run.goes_on()


@pytest.mark.slow
@pytest.mark.parametrize(("fail", "reconnect"), [("kill_node", "start_node"), ("disconnect", "reconnect")])
def test_a_node_that_dies_or_is_cut_off_is_named_and_the_next_start_resumes(nodes, folder, fail, mend):
    run = Run(nodes, folder, fail)
    run.start()
    getattr(nodes, fail)("n2")
    printed = run.ends()
    getattr(nodes, mend)("n2")
    assert re.search(r"n1: error: .*rank 1 on n2 at step \d+", printed)
    run.goes_on()


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named_and_killed_and_the_next_start_resumes(nodes, folder):
    run = Run(nodes, folder, "stopped")
    run.start()
    stopped = run.rank(1)
    stopped.suspend()
    printed = run.ends()
    assert re.search(
        r"n1: error: (the run hangs since \d+ s: )?rank 1 on n2 at step \d+ (without a|has given no) sign of life",
        printed,
    )
    wait_for(lambda: not stopped.is_running())
    run.goes_on()


@pytest.mark.slow
def test_an_error_of_one_rank_is_shown_last_with_its_rank_and_host(nodes, folder):
    run = Run(nodes, folder, "spoiled")
    run.start()
    run.rank(1).send_signal(signal.SIGTERM)
    run.process.wait(TIMEOUT)
    spoiler = folder / "sitecustomize.py"
    spoiler.write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    import pretrain.data.batch as batch\n"
        "    def broken(*arguments, **more):\n        raise ZeroDivisionError('a planted mistake')\n    batch.Batch.to = broken\n"
    )
    try:
        nodes.run_on_control(over_pdsh(run.path), cwd=folder, check=False)
        done = nodes.run_on_control(over_pdsh(run.path), cwd=folder, check=False, PYTHONPATH=f"{folder}:{ROOT}")
    finally:
        spoiler.unlink()
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "error: " in line]
    assert (
        "error: the first to fail was rank 1 on n2" in errors[-1]
        and "ZeroDivisionError: a planted mistake" in errors[-1]
    )
