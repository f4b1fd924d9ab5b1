"""A Slurm cluster of one node for tests. Its munged, slurmctld and slurmd use loopback; all state is in one folder."""

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
    """Return the requirement for a cluster that this machine does not meet, or an empty string."""
    missing = [program for program in PROGRAMS if not _find(program)]
    if missing:
        return f"{', '.join(missing)} not installed (packages slurm-wlm and munge)"
    return "" if os.geteuid() == 0 else "running munged, slurmctld and slurmd needs root"


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")


class Cluster:
    """The running daemons of one Slurm cluster."""

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
        """Start the daemons, and wait until the node accepts jobs."""
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
        """End all jobs and daemons, and kill their remaining processes."""
        with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):
            self.run_command("scancel", "--user=root", check=False, timeout=20)
            self.wait(
                lambda: not self.run_command("squeue", "--noheader", check=False).strip(), "end of the jobs", seconds=20
            )
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for process in psutil.process_iter(["environ"]):  # remaining daemons and their jobs
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

    def wait(
        self, condition: Callable[[], bool], description: str, seconds: float = TIMEOUT, log: Path | None = None
    ) -> None:
        """Poll until the condition holds. Raises AssertionError with all logs after `seconds` or if a daemon exits."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = [
                    *self.folder.glob("*.out"),
                    *self.folder.glob("slurm*.log"),
                    *([log] if log and log.exists() else []),
                ]
                tails = "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in logs)
                raise AssertionError(f"no {description} within {seconds} s; ended: {ended}\n{tails}")
            time.sleep(0.2)

    def environment(self, **more: str) -> dict[str, str]:
        return environment(SLURM_CONF=str(self.settings), **more)

    def run_command(
        self, *command: str | Path, check: bool = True, timeout: float = TIMEOUT, folder: Path = ROOT, **more: str
    ) -> str:
        """Run a command until it exits, and return its standard output and standard error."""
        completed = subprocess.run(
            list(map(str, command)),
            cwd=folder,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or completed.returncode == 0, (
            f"{command} ended with {completed.returncode}:\n{completed.stdout[-4000:]}\n{completed.stderr[-4000:]}"
        )
        return completed.stdout + completed.stderr

    def submit(self, log: Path, *arguments: str | Path, folder: Path = ROOT, **more: str) -> int:
        """Submit a batch job and return its number. `arguments` are passed to sbatch, `more` to its environment."""
        return int(self.run_command("sbatch", "--parsable", f"--output={log}", *arguments, folder=folder, **more))

    def job(self, number: int) -> dict[str, str]:
        """Return Slurm's record of a job: JobState, Reason, Restarts, ExitCode, ..."""
        words = self.run_command("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(self, number: int, log: Path, seconds: float = TIMEOUT) -> dict[str, str]:
        """Wait until a job has ended and is not requeued, and return its record.

        Slurm delays a requeued job by two minutes. This function shortens the delay.
        """
        rescheduled_restarts = set()

        def ended() -> bool:
            job = self.job(number)
            if (
                job["JobState"] == "PENDING"
                and job["Reason"] == "BeginTime"
                and job["Restarts"] not in rescheduled_restarts
            ):
                rescheduled_restarts.add(job["Restarts"])
                # Within the same second, slurmd would confuse the new start with the one that has just ended.
                self.run_command("scontrol", "update", f"JobId={number}", "StartTime=now+2")
            return job["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")

        self.wait(ended, f"end of job {number}", seconds, log)
        return self.job(number)


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Yield a running cluster, and stop it afterwards."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
