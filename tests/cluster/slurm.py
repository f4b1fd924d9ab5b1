"""A Slurm cluster of one node for tests: its own munged, slurmctld and slurmd on loopback, all state in one folder."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.commands import ROOT, environment, free_port
from tests.processes import TIMEOUT

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/node
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES State=UP OverSubscribe=FORCE:4
"""


def missing_requirements() -> str:
    """What this machine lacks for a cluster; empty where it lacks nothing."""
    missing = [program for program in PROGRAMS if not _find(program)]
    if missing:
        return f"there is no {', '.join(missing)} (packages slurm-wlm and munge)"
    return "" if os.geteuid() == 0 else "munged, slurmctld and slurmd of our own need root"


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")


class Cluster:
    """The running daemons, and how commands reach them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen] = {}
        for name in ("controller", "node"):
            (folder / name).mkdir(parents=True)
        self.settings = folder / "slurm.conf"
        self.settings.write_text(
            CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0],
                folder=folder,
                controller_port=free_port(),
                node_port=free_port(),
                cores=os.cpu_count(),
            )
        )

    def start(self) -> None:
        """Start the daemons; return when the node takes jobs."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            *(f"--{option}={self.folder}/munge.{ending}" for option, ending in files.items()),
        )
        self.wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-c")
        self._daemon("slurmd", "-D")
        self.wait(lambda: "idle" in self.run_command("sinfo", "--noheader", "-o", "%T", check=False), "node")

    def stop(self) -> None:
        """End all jobs and daemons, and whatever is left of them."""
        with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):
            self.run_command("scancel", "--user=root", check=False, timeout=20)
            self.wait(
                lambda: not self.run_command("squeue", "--noheader", check=False).strip(), "end of the jobs", seconds=20
            )
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for process in psutil.process_iter(["environ"]):  # the daemons that did not end, and the jobs of theirs
            if (process.info["environ"] or {}).get("SLURM_CONF") == str(self.settings):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        for daemon in self.daemons.values():
            daemon.wait(TIMEOUT)

    def _daemon(self, program: str, *arguments: str) -> None:
        with open(self.folder / f"{program}.out", "w") as output:
            self.daemons[program] = subprocess.Popen(
                [_find(program), *arguments],
                env=self.environment(),
                stdout=output,
                stderr=output,
                cwd=self.folder,
                start_new_session=True,
            )

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = TIMEOUT, log: Path | None = None) -> None:
        """Poll until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = [
                    *self.folder.glob("*.out"),
                    *self.folder.glob("slurm*.log"),
                    *([log] if log and log.exists() else []),
                ]
                told = "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in logs)
                raise AssertionError(f"no {what} within {seconds} s; ended: {ended}\n{told}")
            time.sleep(0.2)

    def environment(self, **more: str) -> dict[str, str]:
        return environment(SLURM_CONF=str(self.settings), **more)

    def run_command(
        self, *command: str | Path, check: bool = True, timeout: float = TIMEOUT, folder: Path = ROOT, **more: str
    ) -> str:
        """Run a command to its end; what it printed."""
        done = subprocess.run(
            list(map(str, command)),
            cwd=folder,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, (
            f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
        return done.stdout + done.stderr

    def submit(self, log: Path, *arguments: str | Path, folder: Path = ROOT, **more: str) -> int:
        """The number of a new batch job; `arguments` are those of sbatch, `more` its environment."""
        return int(self.run_command("sbatch", "--parsable", f"--output={log}", *arguments, folder=folder, **more))

    def job(self, number: int) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Reason, Restarts, ExitCode, ..."""
        words = self.run_command("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(self, number: int, log: Path, seconds: float = TIMEOUT) -> dict[str, str]:
        """Wait for the last end of a job, and spare it most of the two minutes that Slurm keeps it back each time it is queued again."""
        hastened = set()

        def ended() -> bool:
            job = self.job(number)
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime" and job["Restarts"] not in hastened:
                hastened.add(job["Restarts"])
                self.run_command(
                    "scontrol", "update", f"JobId={number}", "StartTime=now+2"
                )  # within the second, slurmd takes it for the one it has ended
            return job["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")

        self.wait(ended, f"end of job {number}", seconds, log)
        return self.job(number)


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster as long as the context lasts."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
