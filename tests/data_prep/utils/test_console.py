"""Messages of a command on its console: the level in LOGLEVEL, and a closed pipe."""

import os
import subprocess

import pytest

from data_prep.utils.console import LEVEL_VARIABLE
from tests.commands import run_command, write_config
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
