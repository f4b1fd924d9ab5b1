"""Supervise a run: `launcher/supervise.py [--crashes N] -- deepspeed [...] launcher/run.py CONFIG [key=value ...]`.

The command after `--` may use any launcher of `run.py`, or plain python. Instead of `run.py` it may run `jepa-train` or
the module `pretrain.training`, as in `deepspeed --module pretrain.training CONFIG`. After a crash of any rank, all
remaining processes of the command are ended. Then the same command is started again, and it resumes from the newest
checkpoint.

SIGTERM, SIGINT and SIGUSR1 are sent directly to all ranks at once and not to the launchers, because the launchers'
handlers would end the ranks before they have saved. A further signal 10 seconds or more after the first
ends everything immediately. SIGHUP stops the ranks as SIGTERM does, unless it is ignored.

Exit codes:

- 0: the run is finished.
- 75: the run was stopped by a signal and can be resumed.
- 2: an error that a restart cannot fix.
- 1: the supervisor gave up after too many crashes.
- 128 + signal: ended by a signal before the ranks could save.

This works on Linux only, and only for the processes of this node. Processes on other nodes are ended by the
launcher that started them (pdsh, mpirun, srun). If the launcher has started no rank on this node, it receives the
signals itself. A SIGKILL to this process alone leaves the command running.
"""

import argparse
import contextlib
import ctypes
import logging
import os
import shlex
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from data_prep.utils.console import UserError, exit_on_user_error, ignore_output_errors
from pretrain.config import load_config
from pretrain.run_folder import REWIND_REASON_PREFIX, list_steps, read_status
from pretrain.training.evaluation_requests import SUPERVISED_VARIABLE
from pretrain.training.main import EXIT_CODE_STOPPED

logger = logging.getLogger("launcher.supervise")

SCRIPTS, MODULE = ("run.py", "jepa-train"), "pretrain.training"
"""Scripts that train, and the module that trains."""
POLL = 0.2
GRACE = 10.0
"""Time after the first signal in which further signals are ignored, in seconds; the ranks use the same time."""
EXIT_SECONDS = 5.0
"""Time that the remaining processes have to exit after the launcher has ended, in seconds."""
SAVE_SECONDS = 60.0
"""The limit that replaces EXIT_SECONDS if the ranks were signalled to stop, in seconds. It is longer because a launcher
that received the signal too may exit before the ranks have saved."""
KILL_SECONDS = 30.0
"""Time after the deadline of `Command.end` in which every process must be gone, in seconds."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
PR_SET_CHILD_SUBREAPER = 36


class StopSignals:
    """Signals received so far: the first asks the ranks to stop, and one after GRACE seconds ends everything."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.received_at = 0.0
        self.kill_signal: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self.received_at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self.received_at >= GRACE:
            self.kill_signal = signal.Signals(number)

    def pause(self, seconds: float) -> None:
        """Sleep for a time, or until the first signal."""
        until = time.monotonic() + seconds
        while self.received is None and time.monotonic() < until:
            time.sleep(POLL)


class Command:
    """One launch of the command, with all processes that descend from it; each has a mark in its environment.

    The command has its own session, so Ctrl-C reaches only this process.
    """

    def __init__(self, words: list[str], stop: StopSignals) -> None:
        self.mark = uuid.uuid4().hex
        self.stop = stop
        self.signalled: set[int] = set()
        """Ids of the processes that have received a signal. They get no second one except SIGKILL, because
        a rank would then exit immediately."""
        self.code: int | None = None
        """Exit code of the first process, negative if a signal ended it; None while it is running."""
        try:
            self.pid = os.posix_spawnp(words[0], words, os.environ | {SUPERVISED_VARIABLE: self.mark}, setsid=True)
        except OSError as error:
            raise UserError(f"cannot start {words[0]}: {error.strerror}; check the command after --") from None

    def wait(self) -> None:
        """Wait until the first process ends, and forward a signal to the ranks meanwhile.

        Return early if everything must end immediately.
        """
        while not self._reap() and not self.stop.kill_signal:
            if self.stop.received:
                self._pass_on(signal.SIGTERM if self.stop.received == signal.SIGHUP else self.stop.received)
            time.sleep(POLL)

    def end(self) -> None:
        """End all remaining processes: SIGTERM, then SIGKILL. Raises UserError if a process survives SIGKILL."""
        deadline = time.monotonic() + (SAVE_SECONDS if self.stop.received else EXIT_SECONDS)
        # Asks twice, because the first scan may miss a process that is starting.
        while remaining := self._processes() or self._processes():
            overdue = time.monotonic() - deadline
            if overdue > KILL_SECONDS:
                raise UserError(
                    f"SIGKILL did not end the processes {', '.join(str(process.pid) for process in remaining)}: "
                    "check what they are waiting for"
                )
            if self.stop.kill_signal or overdue > 0:
                self._send(signal.SIGKILL, remaining)
            else:
                self._send(signal.SIGTERM, [process for process in remaining if process.pid not in self.signalled])
            time.sleep(POLL)
            self._reap()
        self._reap()

    def _processes(self) -> list[psutil.Process]:
        """Return the running processes of the command, whatever their parents are now."""
        return [
            process
            for process in psutil.process_iter(["ppid", "cmdline", "environ"])
            if (process.info["environ"] or {}).get(SUPERVISED_VARIABLE) == self.mark
        ]

    def _pass_on(self, number: signal.Signals) -> None:
        """Send a signal to all ranks at once, including ranks that start later.

        The first process receives it if there is no rank.
        """
        running = self._processes()
        scripts = {process.pid: process for process in running if is_rank_command(process.info["cmdline"] or [])}
        ranks = [process for process in scripts.values() if process.info["ppid"] not in scripts]  # no forks of ranks
        if not ranks and not self.signalled:
            ranks = [process for process in running if process.pid == self.pid]
        self._send(number, [process for process in ranks if process.pid not in self.signalled])

    def _send(self, number: signal.Signals, processes: list[psutil.Process]) -> None:
        for process in processes:
            self.signalled.add(process.pid)
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def _reap(self) -> bool:
        """Reap every process that has ended, and return whether the first process has ended.

        Orphans of the command become children of this process, so it must reap them too.
        """
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.pid:
                    self.code = os.waitstatus_to_exitcode(ended[1])
        return self.code is not None


def is_rank_command(words: list[str]) -> bool:
    """Return whether a command line is Python running the training itself, not a launcher that starts it."""
    if not words or not Path(words[0]).name.startswith("python"):
        return False
    rest = iter(words[1:])
    for word in rest:
        if word in ("-W", "-X"):
            next(rest, None)
        elif word == "-m":
            return next(rest, None) == MODULE
        elif word == "-c":
            return False
        elif not word.startswith("-"):
            return _runs_training(word)
    return False


def _runs_training(word: str) -> bool:
    """Return whether a word of a command line is a script or the module that trains."""
    return Path(word).name in SCRIPTS or word == MODULE


def _run_dir(words: list[str]) -> Path:
    """Return the run directory of a command.

    Raises UserError if the command does not start a training with a configuration.
    """
    script_index = next((index for index, word in enumerate(words) if _runs_training(word)), None)
    if script_index is None:
        raise UserError(
            f"the command after -- runs none of {', '.join(SCRIPTS)} and {MODULE}; use, for example, "
            f"deepspeed [...] launcher/{SCRIPTS[0]} CONFIG [key=value ...], or jepa-train CONFIG [key=value ...]"
        )
    if "--dry-run" in words[script_index:]:
        raise UserError("--dry-run starts no run to supervise: run the command without supervise.py")
    arguments = [word for word in words[script_index + 1 :] if not word.startswith("-")]
    if not arguments:
        raise UserError(f"there is no configuration after {words[script_index]}: add the CONFIG file")
    return load_config(arguments[0], arguments[1:]).run_dir


def _status_stamp(run_dir: Path) -> tuple[int, int] | None:
    """Return a value that changes whenever status.json is written; None if there is no such file."""
    with contextlib.suppress(FileNotFoundError):
        file = (run_dir / "status.json").stat()
        return file.st_ino, file.st_mtime_ns
    return None


def _exit_code(code: int | None, status: dict[str, Any], stop: StopSignals) -> int | None:
    """Return the exit code after the command has ended; None to start the command again.

    `status` is empty if this launch of the command did not write a status.
    """
    state = status.get("status")
    if stop.kill_signal:
        return 128 + stop.kill_signal
    if state == "finished":
        return 0
    if state == "failed" and not status.get("again", True):
        return 2
    if stop.received:
        return EXIT_CODE_STOPPED if state == "resumable" else 128 + stop.received
    return 2 if code == 2 else None


def supervise(words: list[str], run_dir: Path, crashes: int) -> int:
    """Run the command until it finishes, is stopped or crashes too often, and return the exit code."""
    stop = StopSignals()
    attempt = 0
    failures = 0
    highest_step = -1
    pause = FIRST_PAUSE
    while True:
        attempt += 1
        stamp_before = _status_stamp(run_dir)
        started = time.monotonic()
        command = Command(words, stop)
        _log(f"launch {attempt}, process {command.pid}: {shlex.join(words)}")
        try:
            command.wait()
        finally:
            command.end()
        status = read_status(run_dir)
        is_new = _status_stamp(run_dir) != stamp_before
        # A status from an earlier launch still holds if the run was already finished, or if a signal arrived before
        # this launch wrote anything.
        still_holds = status.get("status") in ("finished", "resumable") and (command.code == 0 or stop.received)
        if not (is_new or still_holds):
            status = {}
        ended = f"{_describe_exit(command.code)}, {_describe_status(status)}"
        _log(f"launch {attempt} ended after {time.monotonic() - started:.0f} s: {ended}")
        code = _exit_code(command.code, status, stop)
        if code is not None:
            return _finish(code, stop)

        step = max(list_steps(run_dir / "checkpoints"), default=0)
        rewound = status.get("reason", "").startswith(REWIND_REASON_PREFIX)  # the run limits its rewinds itself
        if step > highest_step or rewound:
            failures, pause = 1, FIRST_PAUSE
        else:
            failures, pause = failures + 1, min(2 * pause, LONGEST_PAUSE)
        highest_step = step if rewound else max(step, highest_step)
        if failures >= crashes:
            logger.error(
                f"supervise: giving up after {failures} consecutive crashes without a checkpoint newer than step "
                f"{highest_step}; the last crash: {ended}. See the error in the output above; "
                f"checkpoints and status.json are in {run_dir}"
            )
            return 1
        seconds = 0 if status.get("status") == "resumable" else pause
        _log(f"starting again in {seconds:.0f} s from step {step}")
        stop.pause(seconds)
        if stop.received:
            code = _exit_code(None, status, stop)
            assert code is not None  # after a stop signal there is always an exit code
            return _finish(code, stop)


def _finish(code: int, stop: StopSignals) -> int:
    _log(f"ending with exit code {code}" + (f" after {stop.received.name}" if stop.received else ""))
    return code


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "unknown exit code"
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _describe_status(status: dict[str, Any]) -> str:
    if not status:
        return "status.json was not written"
    return f"status.json: {status.get('status')} at step {status.get('step')}" + (
        f" ({status['reason']})" if status.get("reason") else ""
    )


def _log(text: str) -> None:
    logger.info(f"supervise: {text}")


def main() -> None:
    """Parse the command line and supervise the command."""
    separator = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(
        usage="%(prog)s [-h] [--crashes N] -- COMMAND",
        description="Run a command that starts launcher/run.py, and restart it after a crash.",
    )
    parser.add_argument(
        "--crashes",
        type=int,
        default=2,
        metavar="N",
        help="give up after this many consecutive crashes without a new checkpoint between them; default: 2",
    )
    crashes = parser.parse_args(sys.argv[1:separator]).crashes
    words = sys.argv[separator + 1 :]
    run_dir = _run_dir(words)
    # Orphans of the command become children of this process.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with ignore_output_errors():  # a closed terminal or a full disk must not end this process before the command
        sys.exit(supervise(words, run_dir, crashes))


def run() -> None:
    """Run `main`, with one line and exit code 2 for an error that the user can fix."""
    exit_on_user_error(main)


if __name__ == "__main__":
    run()
