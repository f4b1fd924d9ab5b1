"""Automatic restarts of a stand-in for run.py, whose behavior each test chooses, and of the real one on two ranks."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_prep.utils.console import UserError
from launcher import supervise
from launcher.supervise import is_rank_command, main
from pretrain.run_folder import list_steps, read_status, write_status
from pretrain.training.evaluation_requests import SUPERVISED_VARIABLE
from tests.commands import (
    ROOT,
    BackgroundCommand,
    deepspeed_command,
    environment,
    prepare_corpus,
    run_command,
    tiny_config,
    write_config,
)
from tests.processes import TIMEOUT, kill_all, wait_for

PYTHON = sys.executable
FAULTY_RUN = ROOT / "tests" / "pretrain" / "training" / "faulty_run.py"
NEVER = 2.0 * TIMEOUT
"""Time longer than any test waits, in seconds. A process that ends within TIMEOUT has not waited this long."""
LIMITS = {"GRACE": NEVER, "EXIT_SECONDS": NEVER, "SAVE_SECONDS": NEVER, "KILL_SECONDS": NEVER}
"""Constants of launcher/supervise.py with which no time limit expires, even on a slow machine."""
SUPERVISE = """
from data_prep.utils.console import exit_on_user_error
from launcher import supervise
vars(supervise).update({limits})
exit_on_user_error(supervise.main)
"""
RUN = """
import os, signal, subprocess, sys, time
from pathlib import Path
from pretrain.run_folder import list_steps, step_name, write_status

folder = Path(__file__).parent
run_dir = folder / "runs" / "run"
rank = int(os.environ.get("RANK", 0))
saving = 0.3  # seconds

def status(name, step=0, reason="", again=True):
    write_status(run_dir, name, step, reason, again)

def save(step):
    (run_dir / "checkpoints" / step_name(step)).mkdir(parents=True)
    status("running", step)

def note(name, text=""):
    (folder / f"{name}.tmp{rank}").write_text(str(text) or str(os.getpid()))
    (folder / f"{name}.tmp{rank}").rename(folder / name)

def save_and_stop(number, frame):
    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signal_number, signal.SIG_DFL)  # as in real ranks, a second signal ends the process
    note(f"signal-{rank}", signal.Signals(number).name)
    time.sleep(saving)
    if rank == 0:
        step = max(list_steps(run_dir / "checkpoints"), default=0) + 1
        save(step)
        status("resumable", step)
    sys.exit(75)

def handle_signals():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, save_and_stop)

run_dir.mkdir(parents=True, exist_ok=True)
start = len(list(folder.glob(f"start-*-{rank}"))) + 1
note(f"start-{start}-{rank}")
"""
LAUNCHER = """
import os, signal, subprocess, sys, time
command = [sys.executable, "-u", *sys.argv[1:]]
ranks = [subprocess.Popen(command, env=os.environ | {"RANK": str(rank)}) for rank in range(2)]

def kill(*_):
    for rank in ranks:
        rank.kill()
    sys.exit(1)

signal.signal(signal.SIGTERM, kill)
signal.signal(signal.SIGINT, kill)
while any(rank.poll() is None for rank in ranks):
    if any(rank.poll() for rank in ranks):
        if all(rank.poll() == 75 for rank in ranks):
            break
        if any(rank.poll() not in (None, 0, 75) for rank in ranks):
            kill()
    time.sleep(0.05)
sys.exit(max(rank.poll() for rank in ranks))
"""


class Supervised:
    """A running supervise.py that starts a stand-in for run.py: one rank, or two ranks under a launcher.

    `body` is the code that each start runs. `limits` replaces constants of supervise.py.
    """

    def __init__(
        self,
        folder: Path,
        body: str,
        *options: str,
        ranks: int = 1,
        launcher: str = LAUNCHER,
        limits: dict[str, float] | None = None,
    ):
        self.folder = folder
        self.run_dir = folder / "runs" / "run"
        self.log = folder / "log.txt"
        config = write_config(folder, tiny_config(folder))
        (folder / "run.py").write_text(f"NEVER = {NEVER}\n{RUN}{body}")
        (folder / "launch.py").write_text(launcher)
        supervise = SUPERVISE.format(limits=LIMITS | (limits or {}))
        command = [
            PYTHON,
            "-c",
            supervise,
            *options,
            "--",
            PYTHON,
            *[str(folder / "launch.py")] * (ranks > 1),
            str(folder / "run.py"),
            str(config),
        ]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT)

    def wait_for_note(self, name: str) -> str:
        """Wait until a start has written the note with this name, and return the text of the note."""
        wait_for((self.folder / name).exists)
        return (self.folder / name).read_text()

    def starts(self) -> int:
        return len(list(self.folder.glob("start-*-0")))

    def end(self) -> int:
        """Wait until supervise.py has exited, assert that no process remains, and return the exit code."""
        code = self.process.wait(TIMEOUT)
        assert not supervised_processes(self.folder), self.output()
        return code

    def output(self) -> str:
        return self.log.read_text()


def supervised_processes(folder: Path) -> list[psutil.Process]:
    """Return the living processes of supervised commands with this folder in their command line."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if SUPERVISED_VARIABLE in (process.info["environ"] or {})
        and str(folder) in shlex.join(process.info["cmdline"] or [])
    ]


@pytest.fixture
def supervised(tmp_path):
    started = []

    def start(body: str, *options: str, **more) -> Supervised:
        started.append(Supervised(tmp_path / str(len(started)), body, *options, **more))
        return started[-1]

    yield start
    for run in started:
        kill_all(run.process)
    for process in supervised_processes(tmp_path):
        process.kill()


def test_a_run_is_restarted_after_crashes_with_progress_until_it_is_finished(supervised):
    run = supervised("""
if start == 4:
    status("finished", 40)
else:
    save(10 * start)
    os.kill(os.getpid(), signal.SIGKILL)
""")
    assert run.end() == 0 and run.starts() == 4
    assert [f"starting again in 1 s from step {step}" in run.output() for step in (10, 20, 30)] == [True] * 3
    assert "launch 1 ended after" in run.output() and "SIGKILL, status.json: running at step 10" in run.output()


def test_two_crashes_without_a_new_checkpoint_end_the_restarts(supervised):
    run = supervised("""
if start == 1:
    save(10)
status("failed", 10, "RuntimeError: no such thing")
sys.exit(1)
""")
    assert run.end() == 1 and run.starts() == 2
    assert (
        "supervise: giving up after 2 consecutive crashes without a checkpoint newer than step 10; "
        "the last crash: exit code 1, status.json: failed at step 10 (RuntimeError: no such thing)."
    ) in run.output()


def test_the_pause_doubles_without_progress_and_is_reset_by_progress(supervised):
    run = supervised(
        """
if start == 3:
    save(10)
sys.exit(1)
""",
        "--crashes",
        "3",
    )
    assert run.end() == 1 and run.starts() == 5
    pauses = [line.split(" in ")[1] for line in run.output().splitlines() if "starting again" in line]
    assert pauses == ["1 s from step 0", "2 s from step 0", "1 s from step 10", "2 s from step 10"]


def test_a_run_is_not_restarted_after_an_error_that_the_user_must_fix(supervised):
    bodies = [
        "status('failed', 3, 'the disk is full', again=False)\nsys.exit(1)",
        "print('error: no corpus')\nsys.exit(2)",
    ]
    for run in [supervised(body) for body in bodies]:
        assert run.end() == 2 and run.starts() == 1


def test_the_status_of_an_earlier_start_is_ignored_unless_the_run_is_finished(supervised, tmp_path):
    for folder in "01":
        (tmp_path / folder / "runs" / "run").mkdir(parents=True)
        write_status(tmp_path / folder / "runs" / "run", "finished", 5)
    crashing, finished = supervised("sys.exit(1)"), supervised("print('is finished already')")
    assert crashing.end() == 1 and crashing.starts() == 2 and "status.json was not written" in crashing.output()
    assert finished.end() == 0 and finished.starts() == 1


def test_ranks_that_another_process_stopped_are_restarted_immediately(supervised):
    run = supervised("""
handle_signals()
if start == 2:
    status("finished", 1)
else:
    note("ready")
    time.sleep(NEVER)
""")
    os.kill(int(run.wait_for_note("ready")), signal.SIGTERM)
    assert run.end() == 0 and run.starts() == 2
    assert "starting again in 0 s from step 1" in run.output()


def test_a_signal_is_sent_to_all_ranks_directly(supervised):
    forwarded = {
        signal.SIGTERM: "SIGTERM",
        signal.SIGINT: "SIGINT",
        signal.SIGUSR1: "SIGUSR1",
        signal.SIGHUP: "SIGTERM",
    }
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # the tests run under nohup
        del forwarded[signal.SIGHUP]
    runs = {
        number: supervised("handle_signals()\nnote(f'ready-{rank}')\ntime.sleep(NEVER)", ranks=2)
        for number in forwarded
    }
    for number, run in runs.items():
        assert {os.getsid(int(run.wait_for_note(f"ready-{rank}"))) for rank in range(2)} == {
            psutil.Process(run.process.pid).children()[0].pid
        }
        run.process.send_signal(number)  # the signal reaches only supervise.py
        run.process.send_signal(number)  # a repeated signal
    for number, run in runs.items():
        assert run.end() == 75 and run.starts() == 1
        assert run.wait_for_note("signal-0") == run.wait_for_note("signal-1") == forwarded[number]
        assert read_status(run.run_dir)["status"] == "resumable"
        assert f"ending with exit code 75 after {number.name}" in run.output()


def test_child_processes_of_a_rank_get_no_signal_and_are_killed_after_the_rank_has_ended(supervised):
    run = supervised("""
handle_signals()
saving, parent = 1, os.getpid()
if os.fork() == 0:  # the child has the same command line as the rank
    def handle(*_):
        if os.getppid() == parent:
            note("signaled-too-early")
        os._exit(0)
    signal.signal(signal.SIGTERM, handle)
    time.sleep(NEVER)
subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({NEVER})", str(folder)], start_new_session=True)
note("ready")
time.sleep(NEVER)
""")
    run.wait_for_note("ready")
    assert len(supervised_processes(run.folder)) == 3
    run.process.terminate()
    assert run.end() == 75 and not (run.folder / "signaled-too-early").exists()


def test_ranks_can_save_after_their_launcher_has_died(supervised):
    run = supervised(
        "handle_signals()\nsaving = 3\nnote(f'ready-{rank}')\ntime.sleep(NEVER)", ranks=2, limits={"EXIT_SECONDS": 1.0}
    )
    run.wait_for_note("ready-0"), run.wait_for_note("ready-1")
    launcher = psutil.Process(run.process.pid).children()[0]
    run.process.terminate()
    run.wait_for_note("signal-0"), run.wait_for_note("signal-1")
    launcher.kill()
    assert run.end() == 75 and read_status(run.run_dir)["status"] == "resumable"


def test_the_default_limits_leave_ranks_enough_time_to_save(supervised):
    """A signal that is repeated immediately, as launchers do, does not count as a second signal."""
    default_limits = {name: getattr(supervise, name) for name in LIMITS}
    run = supervised(
        "handle_signals()\nsaving = 3\nnote(f'ready-{rank}')\ntime.sleep(NEVER)", ranks=2, limits=default_limits
    )
    run.wait_for_note("ready-0"), run.wait_for_note("ready-1")
    launcher = psutil.Process(run.process.pid).children()[0]
    run.process.terminate()
    run.wait_for_note("signal-0"), run.wait_for_note("signal-1")
    run.process.terminate()
    launcher.kill()
    assert run.end() == 75 and read_status(run.run_dir)["status"] == "resumable"


def test_a_signal_before_any_rank_has_started_ends_the_launcher(supervised):
    run = supervised("", ranks=2, launcher=f"import time; print('waiting', flush=True); time.sleep({NEVER})")
    wait_for(lambda: "\nwaiting\n" in run.output())
    run.process.terminate()
    assert run.end() == 128 + signal.SIGTERM


def test_a_second_signal_kills_all_processes_immediately(supervised):
    run = supervised(
        """
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: note(f"signal-{rank}", signal.Signals(number).name))  # does not stop
note(f"ready-{rank}")
time.sleep(NEVER)
""",
        ranks=2,
        limits={"GRACE": 1.0},
    )
    run.wait_for_note("ready-0"), run.wait_for_note("ready-1")
    run.process.terminate()
    assert run.wait_for_note("signal-0") == run.wait_for_note("signal-1") == "SIGTERM"
    time.sleep(1)  # GRACE has expired after this: it began before the ranks got the signal
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT and run.starts() == 1


def test_a_signal_ends_the_pause_before_a_restart(supervised):
    run = supervised("sys.exit(1)", "--crashes", "9", limits={"FIRST_PAUSE": NEVER})
    wait_for(lambda: f"starting again in {NEVER:.0f} s" in run.output())
    run.process.terminate()
    assert run.end() == 128 + signal.SIGTERM and run.starts() == 1


def test_orphaned_ranks_of_a_killed_launcher_end_before_the_next_start_and_leave_no_zombie(supervised):
    run = supervised(
        """
if start == 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(f"ready-{rank}")
    time.sleep(NEVER)
living = subprocess.run(["ps", "-eo", "pid"], capture_output=True, text=True).stdout.split()
orphans = [(folder / f"ready-{rank}").read_text() for rank in range(2)]
note(f"left-{rank}", [pid for pid in orphans if pid in living])
while not (folder / "checked").exists():
    time.sleep(0.05)
if rank == 0:
    status("finished", 1)
""",
        ranks=2,
        limits={"EXIT_SECONDS": 1.0},
    )
    orphans = [int(run.wait_for_note(f"ready-{rank}")) for rank in range(2)]
    supervisor = psutil.Process(run.process.pid)
    supervisor.suspend()  # keeps the orphans alive until they have been checked
    supervisor.children()[0].kill()
    wait_for(lambda: all(psutil.Process(pid).ppid() == supervisor.pid for pid in orphans))
    supervisor.resume()
    assert run.wait_for_note("left-0") == run.wait_for_note("left-1") == "[]"
    assert not [child for child in supervisor.children() if child.status() == psutil.STATUS_ZOMBIE]
    (run.folder / "checked").touch()
    assert run.end() == 0 and not any(psutil.pid_exists(pid) for pid in orphans)


def test_a_background_evaluation_outlives_its_rank_and_the_supervisor(supervised, tmp_path):
    run = supervised("""
from pretrain.training import evaluation_requests
(folder / "nice").write_text(f"#!/bin/sh\\necho $$ > {folder}/evaluating\\nexec sleep {NEVER}\\n")
(folder / "nice").chmod(0o755)
# This `nice` replaces the evaluation, which is started as `setsid --fork nice python ...`.
os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
evaluation_requests.start_evaluations(run_dir, "cpu")
while not (folder / "evaluating").exists() or not (folder / "evaluating").read_text():
    time.sleep(0.05)
status("finished", 1)
""")
    assert run.end() == 0
    job = psutil.Process(int(run.wait_for_note("evaluating")))
    wait_for(lambda: job.name() == "sleep")
    job.kill()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["deepspeed", "launcher/train.py", "{config}"], "runs none of run.py, jepa-train and pretrain.training"),
        ([], "runs none of run.py, jepa-train and pretrain.training"),
        (["jepa-train", "{config}", "train.stps=3"], "unknown key 'train.stps'"),
        (["deepspeed", "--module", "pretrain.training", "{config}", "train.stps=3"], "unknown key 'train.stps'"),
        (["deepspeed", "launcher/run.py"], "there is no configuration after launcher/run.py"),
        (["python", "launcher/run.py", "{config}", "train.stps=3"], "unknown key 'train.stps'"),
        (["python", "launcher/run.py", "{config}", "--dry-run"], "--dry-run starts no run to supervise"),
    ],
)
def test_an_invalid_command_is_reported_before_anything_is_started(tmp_path, monkeypatch, command, expected):
    config = write_config(tmp_path, tiny_config(tmp_path))
    monkeypatch.setattr(sys, "argv", ["supervise.py", "--", *[word.format(config=config) for word in command]])
    with pytest.raises(UserError, match=re.escape(expected)):
        main()


def test_a_missing_launcher_is_reported_in_one_line_with_exit_code_2(tmp_path):
    config = write_config(tmp_path, tiny_config(tmp_path))
    completed = run_command(
        [PYTHON, "launcher/supervise.py", "--", "no-such-launcher", "launcher/run.py", str(config)], check=False
    )
    assert (completed.returncode, completed.stdout, completed.stderr) == (
        2,
        "",
        "error: cannot start no-such-launcher: No such file or directory; check the command after --\n",
    )


@pytest.mark.parametrize(
    ("line", "is_rank"),
    [
        ("python3.11 -u launcher/run.py --local_rank=0 a.yaml", True),
        ("/usr/bin/python -W ignore -X dev launcher/run.py a.yaml", True),
        ("python bin/deepspeed --num_gpus 2 launcher/run.py a.yaml", False),
        ("python -u -m deepspeed.launcher.launch --master_port=1 launcher/run.py a.yaml", False),
        ("mpirun -n 2 python launcher/run.py a.yaml", False),
        ("srun launcher/run.py a.yaml", False),
        ("/env/bin/python3.11 /env/bin/jepa-train a.yaml", True),
        ("python -u -m pretrain.training --local_rank=1 a.yaml", True),
        ("python bin/deepspeed --module pretrain.training a.yaml", False),
        ("python -u -m deepspeed.launcher.launch --module pretrain.training a.yaml", False),
        ("python -c pass launcher/run.py", False),
        ("", False),
    ],
)
def test_a_rank_is_recognized_by_its_command_line(line, is_rank):
    assert is_rank_command(line.split()) == is_rank


@pytest.mark.slow
def test_two_real_ranks_finish_after_a_kill_and_a_stop(tmp_path):
    path = write_config(tmp_path, tiny_config(tmp_path, train__steps=60, checkpoint={"every": 5, "keep": 2}))
    prepare_corpus(path)
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    supervised = [PYTHON, "launcher/supervise.py", "--"]
    waiting = tmp_path / "run.py"
    waiting.write_text(
        f"import runpy, sys\nsys.argv.insert(1, 'hold:30')\nrunpy.run_path({str(FAULTY_RUN)!r}, run_name='__main__')\n"
    )

    running = BackgroundCommand([*supervised, *deepspeed_command(2, waiting, path)], tmp_path / "first.log")
    running.wait_until(lambda: len(list_steps(checkpoints)) > 0, "a checkpoint")
    killed = running.ranks()
    killed[1].kill()
    running.wait_until(lambda: "resuming from step" in running.log.read_text(), "the second start")
    assert not any(rank.is_running() for rank in killed)
    running.wait_until(
        lambda: "step" in running.log.read_text().split("resuming from step")[1].split("\n", 1)[1], "a step"
    )
    running.process.terminate()
    assert running.end() == 75 and not supervised_processes(tmp_path)
    status = read_status(tmp_path / "runs" / "run")
    assert (status["status"], status["reason"]) == ("resumable", "stopped by SIGTERM")
    assert list_steps(checkpoints)[-1] == status["step"]

    running = BackgroundCommand([*supervised, *deepspeed_command(2, "launcher/run.py", path)], tmp_path / "second.log")
    assert running.end() == 0 and not supervised_processes(tmp_path)
    assert f"resuming from step {status['step']}" in running.log.read_text()
    assert read_status(tmp_path / "runs" / "run")["status"] == "finished"
