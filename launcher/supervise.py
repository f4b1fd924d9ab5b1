"""Keep a run going: `launcher/supervise.py [--crashes N] -- deepspeed [...] launcher/run.py CONFIG [key=value ...]`.

Any launcher of `run.py` can stand behind the `--`, or plain python. After a crash of any rank everything that is left of the command is ended,
and the same command is started again, which goes on from the newest checkpoint.

SIGTERM, SIGINT and SIGUSR1 are passed on to all ranks at once, past the launchers, whose own handlers would end the ranks before these have
saved. A signal that comes 10 seconds later, or more, ends everything at once. SIGHUP, where it is not ignored, stops the ranks as SIGTERM does.

Exit codes: 0 the run is finished; 75 it was stopped by a signal and can go on; 2 a mistake that starting again cannot mend; 1 given up;
128 + signal: ended by a signal before the ranks could save.

Linux only, and the processes of this node only: those on other nodes are ended by the launcher that started them (pdsh, mpirun, srun). Where
it has started no rank on this node, the launcher itself gets the signals. SIGKILL to this process alone leaves the command running.
"""

import argparse
import contextlib
import ctypes
import os
import shlex
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from data_prep.console import UserError, exit_on_user_error, ignore_output_errors, print_now
from pretrain.config import load_config
from pretrain.run_folder import REWIND_REASON_PREFIX, list_steps, read_status
from pretrain.training.evaluation_requests import SUPERVISED_VARIABLE
from pretrain.training.main import EXIT_CODE_STOPPED

SCRIPT = "run.py"
POLL = 0.2
GRACE = 10.0
"""Seconds in which another signal is taken for a repetition of the first, as in the ranks."""
LEFT = 5.0
"""Seconds that processes have to end by themselves once the launcher has ended."""
SAVING = 60.0
"""The same where the ranks were told to stop: a launcher that had the signal too is gone before they have saved."""
UNKILLABLE = 30.0
"""Seconds after SIGKILL in which a process must be gone."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
PR_SET_CHILD_SUBREAPER = 36


class Stop:
    """The signals that this process gets: the first asks the ranks to stop, a later one ends everything at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.since = 0.0
        self.at_once: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self.since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self.since >= GRACE:
            self.at_once = signal.Signals(number)

    def pause(self, seconds: float) -> None:
        """Sleep, but not longer than to the first signal."""
        until = time.monotonic() + seconds
        while self.received is None and time.monotonic() < until:
            time.sleep(POLL)


class Command:
    """One start of the command, and all processes that come from it: each carries a mark in its environment.

    It has a session of its own, so that Ctrl-C reaches this process alone.
    """

    def __init__(self, words: list[str], stop: Stop) -> None:
        self.mark, self.stop = uuid.uuid4().hex, stop
        self.told: set[int] = set()
        """Processes that have had a signal. None gets a second one: a rank takes that for the wish to end at once."""
        self.code: int | None = None
        """Exit code of the first process, negative where a signal ended it; None while it runs."""
        try:
            self.pid = os.posix_spawnp(words[0], words, os.environ | {SUPERVISED_VARIABLE: self.mark}, setsid=True)
        except OSError as error:
            raise UserError(f"cannot start {words[0]}: {error.strerror}") from None

    def wait(self) -> None:
        """Wait for the end of the first process, and tell the ranks of a signal. Returns before that where all is to end at once."""
        while not self._ended() and not self.stop.at_once:
            if self.stop.received:
                self._pass_on(signal.SIGTERM if self.stop.received == signal.SIGHUP else self.stop.received)
            time.sleep(POLL)

    def end(self) -> None:
        """End all that is left: SIGTERM, then SIGKILL. Raises UserError for a process that even this does not end."""
        deadline = time.monotonic() + (SAVING if self.stop.received else LEFT)
        while left := self._processes() or self._processes():  # the first look may miss one that was just being started
            late = time.monotonic() - deadline
            if late > UNKILLABLE:
                raise UserError(
                    f"SIGKILL does not end {', '.join(str(process.pid) for process in left)}: look at what these processes wait for"
                )
            if self.stop.at_once or late > 0:
                self._send(signal.SIGKILL, left)
            else:
                self._send(signal.SIGTERM, [process for process in left if process.pid not in self.told])
            time.sleep(POLL)
            self._ended()
        self._ended()

    def _processes(self) -> list[psutil.Process]:
        """The living processes of the command, whoever their parents are by now."""
        return [
            process
            for process in psutil.process_iter(["ppid", "cmdline", "environ"])
            if (process.info["environ"] or {}).get(SUPERVISED_VARIABLE) == self.mark
        ]

    def _pass_on(self, number: signal.Signals) -> None:
        """Send a signal to all ranks at once, also to those that come later; to the first process where there is no rank."""
        running = self._processes()
        scripts = {process.pid: process for process in running if is_rank_command(process.info["cmdline"] or [])}
        ranks = [
            process for process in scripts.values() if process.info["ppid"] not in scripts
        ]  # not what a rank has forked
        if not ranks and not self.told:
            ranks = [process for process in running if process.pid == self.pid]
        self._send(number, [process for process in ranks if process.pid not in self.told])

    def _send(self, number: signal.Signals, processes: list[psutil.Process]) -> None:
        for process in processes:
            self.told.add(process.pid)
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def _ended(self) -> bool:
        """Whether the first process has ended; takes in what has ended of the others, for this process is the parent of orphans."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.pid:
                    self.code = os.waitstatus_to_exitcode(ended[1])
        return self.code is not None


def is_rank_command(words: list[str]) -> bool:
    """Whether a command line is Python running run.py itself, and not a launcher that has it among its arguments."""
    rest = iter(words[1:])
    for word in rest:
        if word in ("-W", "-X"):
            next(rest, None)
        elif word in ("-m", "-c"):
            return False
        elif not word.startswith("-"):
            return Path(words[0]).name.startswith("python") and Path(word).name == SCRIPT
    return False


def _run_dir(words: list[str]) -> Path:
    """The run directory of a command. Raises UserError."""
    place = next((place for place, word in enumerate(words) if Path(word).name == SCRIPT), None)
    if place is None:
        raise UserError(
            f"the command behind -- has no {SCRIPT} in it: supervise.py -- deepspeed [...] launcher/{SCRIPT} CONFIG [key=value ...]"
        )
    if "--dry-run" in words[place:]:
        raise UserError("--dry-run starts nothing that could be supervised: call it without supervise.py")
    arguments = [word for word in words[place + 1 :] if not word.startswith("-")]
    if not arguments:
        raise UserError(f"no configuration stands behind {words[place]}")
    return load_config(arguments[0], arguments[1:]).run_dir


def _written(run_dir: Path) -> tuple[int, int] | None:
    """What changes whenever status.json is written."""
    with contextlib.suppress(FileNotFoundError):
        file = (run_dir / "status.json").stat()
        return file.st_ino, file.st_mtime_ns
    return None


def _exit_code(code: int | None, status: dict[str, Any], stop: Stop) -> int | None:
    """What to end with after the command has ended; None to start it again. `status` is empty where this start has written none."""
    state = status.get("status")
    if stop.at_once:
        return 128 + stop.at_once
    if state == "finished":
        return 0
    if state == "failed" and not status.get("again", True):
        return 2
    if stop.received:
        return EXIT_CODE_STOPPED if state == "resumable" else 128 + stop.received
    return 2 if code == 2 else None


def supervise(words: list[str], run_dir: Path, crashes: int) -> int:
    """Run the command until it is finished, stopped or given up; return the exit code."""
    stop, attempt, in_a_row, reached, pause = Stop(), 0, 0, -1, FIRST_PAUSE
    while True:
        attempt, before, started = attempt + 1, _written(run_dir), time.monotonic()
        command = Command(words, stop)
        _say(f"start {attempt}, process {command.pid}: {shlex.join(words)}")
        try:
            command.wait()
        finally:
            command.end()
        status = read_status(run_dir)
        if _written(run_dir) == before and (
            status.get("status") not in ("finished", "resumable") or not (command.code == 0 or stop.received)
        ):
            status = {}  # of an earlier start; but one that was finished already, or that a signal met before it wrote anything, is what it was
        ended = f"{_how(command.code)}, {_what(status)}"
        _say(f"start {attempt} ended after {time.monotonic() - started:.0f} s: {ended}")
        code = _exit_code(command.code, status, stop)
        if code is not None:
            return _last(code, stop)

        step = max(list_steps(run_dir / "checkpoints"), default=0)
        went_back = status.get("reason", "").startswith(REWIND_REASON_PREFIX)  # which the run itself bounds
        in_a_row, pause = (
            (1, FIRST_PAUSE) if step > reached or went_back else (in_a_row + 1, min(2 * pause, LONGEST_PAUSE))
        )
        reached = step if went_back else max(step, reached)
        if in_a_row >= crashes:
            _say(
                f"giving up: ended {in_a_row} times in a row with no checkpoint later than step {reached}; the last time: {ended}. "
                f"What went wrong stands in the output above; checkpoints and status.json are in {run_dir}"
            )
            return 1
        seconds = 0 if status.get("status") == "resumable" else pause
        _say(f"starting again in {seconds:.0f} s from step {step}")
        stop.pause(seconds)
        if stop.received:
            code = _exit_code(None, status, stop)
            assert code is not None  # a stop was asked for
            return _last(code, stop)


def _last(code: int, stop: Stop) -> int:
    _say(f"ending with exit code {code}" + (f" after {stop.received.name}" if stop.received else ""))
    return code


def _how(code: int | None) -> str:
    if code is None:
        return "not ended by itself"
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _what(status: dict[str, Any]) -> str:
    if not status:
        return "nothing written to status.json"
    return f"status.json says {status.get('status')} at step {status.get('step')}" + (
        f" ({status['reason']})" if status.get("reason") else ""
    )


def _say(text: str) -> None:
    print_now(f"supervise: {text}")


def main() -> None:
    """Parse the command line and supervise the command."""
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(
        usage="%(prog)s [-h] [--crashes N] -- COMMAND",
        description="Run a command of launcher/run.py, and start it again after a crash.",
    )
    parser.add_argument(
        "--crashes",
        type=int,
        default=2,
        metavar="N",
        help="give up after this many crashes in a row without a new checkpoint between them (default 2)",
    )
    crashes, words = parser.parse_args(sys.argv[1:at]).crashes, sys.argv[at + 1 :]
    run_dir = _run_dir(words)
    ctypes.CDLL(None).prctl(
        PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0
    )  # orphans of the command become children of this process
    with ignore_output_errors():  # a closed terminal or a full disk must not end this process before the command
        sys.exit(supervise(words, run_dir, crashes))


if __name__ == "__main__":
    exit_on_user_error(main)
