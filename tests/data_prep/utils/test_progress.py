"""Progress of slow steps: on a terminal, in a log, and in the file of `saved_progress`."""

import os
import pty
import subprocess
import sys
import termios

import pytest

from data_prep.utils import progress
from data_prep.utils.progress import Progress, saved_progress
from tests.commands import environment
from tests.processes import TIMEOUT

STEP = """
from data_prep.utils import progress
from data_prep.utils.console import exit_on_user_error
def main():
    progress.RENEWAL_SECONDS = 0
    with progress.Progress("generating", 1000) as step:
        step.started -= 30
        step.update(250)
        step.update(250)
exit_on_user_error(main)
"""


@pytest.fixture
def immediate(monkeypatch):
    """Show each update."""
    monkeypatch.setattr(progress, "RENEWAL_SECONDS", 0)
    monkeypatch.setattr(Progress, "LINE_SECONDS", 0)


def on_terminal(command: list[str], **variables: str) -> tuple[str, str]:
    """Run a command whose standard error is a terminal; return what it prints and what the terminal receives."""
    reading, writing = pty.openpty()
    termios.tcsetwinsize(writing, (24, 100))
    done = subprocess.run(
        command, env=environment(**variables), stdout=subprocess.PIPE, stderr=writing, text=True, timeout=TIMEOUT
    )
    os.close(writing)
    received = b""
    try:
        while part := os.read(reading, 65536):
            received += part
    except OSError:  # the terminal has no more writer
        pass
    os.close(reading)
    assert done.returncode == 0, received
    return done.stdout, received.decode()


def test_a_terminal_shows_one_line_that_renews_itself():
    printed, received = on_terminal([sys.executable, "-c", STEP])
    assert printed == "" and received.count("\n") == 1
    last = received.strip().split("\r")[-1]
    assert "generating" in last and "500 of 1000 rows" in last and "30s left" in last


@pytest.mark.parametrize("delay, shown", [(20, "30s left"), (40, "")])
def test_a_step_with_a_delay_shows_nothing_before_it(delay, shown):
    step = STEP.replace('"generating", 1000', f'"generating", 1000, delay={delay}')
    received = on_terminal([sys.executable, "-c", step])[1]
    assert shown in received and bool(received) == bool(shown)


def test_the_level_of_messages_hides_the_line():
    assert on_terminal([sys.executable, "-c", STEP], LOGLEVEL="WARNING") == ("", "")


def test_a_log_shows_lines_with_the_time_left(immediate, messages):
    with Progress("scoring", 1000) as step:
        step.started -= 60
        step.update(0, begun=250)
        step.update(500)
        step.update(500)
    assert messages == [
        "scoring: 0 of 1,000 rows, 25% of the work, 3m00s left",
        "scoring: 500 of 1,000 rows, 1m00s left",
    ]


def test_a_log_shows_no_line_before_some_seconds_have_passed(messages):
    with Progress("scoring", 3) as step:
        step.update(1)
        step.last_line -= Progress.LINE_SECONDS
        step.last_renewal -= progress.RENEWAL_SECONDS
        step.update(1)
        step.update(1)
    assert len(messages) == 1 and messages[0].startswith("scoring: 2 of 3 rows")


def test_a_single_unit_shows_nothing(immediate, messages):
    with Progress("generating", 1) as step:
        step.update(0, begun=0.5)
        step.update(1)
    assert messages == []


def test_the_file_describes_the_step_until_the_work_ends(immediate, tmp_path):
    path = tmp_path / "progress"
    with saved_progress(path, "evaluating spider at step 5"):
        assert path.read_text() == "evaluating spider at step 5"
        with Progress("running queries", 10) as step:
            step.started -= 60
            step.update(5)
            assert path.read_text() == "evaluating spider at step 5: running queries 5 of 10 rows, 1m00s left"
    assert not path.exists()


def test_a_folder_that_cannot_be_written_ends_no_step(immediate, tmp_path):
    with saved_progress(tmp_path / "missing" / "progress", "evaluating"), Progress("scoring", 2) as step:
        step.update(1)
    assert step.done == 1 and not (tmp_path / "missing").exists()
