"""Messages of a command on its console: the level in LOGLEVEL, and a closed pipe."""

import os
import subprocess
import sys

import pytest

from data_prep.utils.console import LEVEL_VARIABLE, file_system_error
from tests.commands import environment, run_command, write_config
from tests.processes import TIMEOUT
from tests.small_corpora import json_source


@pytest.fixture
def config(tmp_path, write_jsonl, pairs):
    """Configuration of a corpus with one warning, because a source lacks a column."""
    sources = [
        json_source(write_jsonl(tmp_path / "a.jsonl", pairs(50))),
        json_source(write_jsonl(tmp_path / "b.jsonl", pairs(9)), views={"text": "txet", "code": "code"}),
    ]
    data = {
        "path": str(tmp_path / "out"),
        "sources": sources,
        "tokenizer": {"vocab_size": 340},
        "sequence_length": 128,
        "workers": 1,
    }
    return write_config(tmp_path, {"name": "x", "data": data})


def test_the_level_hides_progress_but_not_warnings(config):
    done = run_command(["python", "-m", "data_prep", config], **{LEVEL_VARIABLE: "warning"})
    (line,) = done.stdout.splitlines()
    assert line.startswith("WARNING: data.sources.1 has 9 records, but none of them was kept") and done.stderr == ""


def test_an_unknown_level_is_reported_in_one_line(config):
    done = run_command(["python", "-m", "data_prep", config], check=False, **{LEVEL_VARIABLE: "loud"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the environment variable LOGLEVEL is LOUD: set it to INFO, WARNING or ERROR\n"


def test_a_closed_pipe_ends_the_command_silently(config, command):
    arguments, environment = command(config)
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    with open(writing_end, "w") as pipe:
        done = subprocess.run(
            arguments, env=environment, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT
        )
    assert (done.returncode, done.stderr) == (1, "")


PROGRAM = """
import sys
from pathlib import Path
from data_prep.utils.console import exit_on_user_error
from data_prep.utils.files import write_text
exit_on_user_error(lambda: {action})
"""
WITHOUT_RIGHTS = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
"""Beginning of a command that makes permissions apply to root too."""


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("Path('/dev/full').write_text('x')", "cannot write: No space left on device; free space there, or choose"),
        ("write_text(Path('{folder}/x'), 'y')", "{folder}/x: Permission denied; change the permissions, or choose"),
        ("Path('{folder}/file/x').write_text('y')", "{folder}/file/x: Not a directory; correct the path"),
    ],
)
def test_an_error_of_the_file_system_is_one_line(tmp_path, action, expected):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    folder.chmod(0o555)
    done = subprocess.run(
        [*WITHOUT_RIGHTS, sys.executable, "-c", PROGRAM.format(action=action.format(folder=folder))],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: " + expected.format(folder=folder)) and done.stderr.count("\n") == 1


def test_other_errors_keep_their_traceback():
    done = run_command(["python", "-c", PROGRAM.format(action="Path('nowhere').read_text()")], check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr and "FileNotFoundError" in done.stderr


def test_an_error_of_safetensors_is_recognised():
    error = Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "No space left on device; free space" in str(file_system_error(error))
    assert file_system_error(ValueError("28")) is None
