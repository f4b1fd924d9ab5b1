"""The output of a run goes to the console and to its log; a run survives the loss of its console."""

import os
import re
import signal
from pathlib import Path
from typing import IO

import pytest

from pretrain.evaluation.summary import print_summary
from pretrain.run_folder import read_status
from tests.commands import ROOT, prepare_corpus, ranks_command, run_command, start, tiny_config, write_config
from tests.processes import TIMEOUT, wait_for

FAULTY_RUN = ROOT / "tests" / "pretrain" / "training" / "faulty_run.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prepare a corpus and return its folder."""
    folder = tmp_path_factory.mktemp("output")
    prepare_corpus(write_config(folder, tiny_config(folder)))
    return folder


def test_every_term_of_the_objective_is_shown(folder, capsys):
    """In the progress line, the validation line, a TensorBoard chart and the summary."""
    objective = {"name": "llm_jepa", "weight": 0.5, "regularizers": [{"name": "coding_rate", "weight": 0.1}]}
    changes = {"train__steps": 2, "monitor__validate_every": 2, "monitor__loggers": ["tensorboard"]}
    path = write_config(folder, tiny_config(folder, name="terms", objective=objective, **changes))
    output = run_command(["python", "launcher/run.py", str(path)]).stdout
    run_dir = folder / "runs" / "terms"
    number = r"-?\d+\.\d{4}"
    assert re.search(rf"step      2 .* lm {number}  jepa {number}  coding_rate {number}  ", output)
    assert re.search(rf"validation at step 2: lm {number}, jepa {number}, coding_rate {number}, ", output)
    events = b"".join(path.read_bytes() for path in (run_dir / "tensorboard").rglob("events*"))
    assert b"^validation/loss/coding_rate$" in events
    print_summary(run_dir)
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "loss/" in line]
    terms = ["lm", "jepa", "coding_rate"]
    assert rows == [f"loss/{term}" for term in terms] + [f"validation/loss/{term}" for term in terms]


def full_disk() -> IO[str]:
    return open("/dev/full", "w")


def closed_pipe() -> IO[str]:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def exit_code_of(command: list[str], broken_output: IO[str]) -> int:
    """Return the exit code of a command whose stdout and stderr are lost."""
    with broken_output:
        return start(command, broken_output, broken_output).wait(TIMEOUT)


@pytest.mark.parametrize("broken_output", [full_disk, closed_pipe])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_survives_the_loss_of_its_output(folder, ranks, broken_output):
    path = write_config(folder, tiny_config(folder, name=f"{broken_output.__name__}-{ranks}", train__steps=3))
    command = (
        ["python", str(FAULTY_RUN), "none", str(path)] if ranks == 1 else ranks_command(2, FAULTY_RUN, "none", path)
    )
    run_dir = folder / "runs" / f"{broken_output.__name__}-{ranks}"
    assert exit_code_of(command, broken_output()) == 0, (run_dir / "logs" / "rank-00000.log").read_text()
    assert read_status(run_dir)["status"] == "finished"
    log = (run_dir / "logs" / "rank-00000.log").read_text()
    assert "step 3" in log and "finished at step 3" in log and "Traceback" not in log


@pytest.mark.parametrize("broken_output", [full_disk, closed_pipe])
# the first mistake is found when the file is read, the second one during the run
@pytest.mark.parametrize("mistake", [{"objective__wieght": 1}, {"data__sequence_length": 16}])
def test_a_mistake_keeps_its_exit_code_without_output(folder, mistake, broken_output):
    path = write_config(folder, tiny_config(folder, name="mistaken", **mistake))
    assert exit_code_of(["python", "launcher/run.py", str(path)], broken_output()) == 2


def test_an_error_without_output_keeps_its_exit_code_and_its_traceback_is_in_the_log(folder):
    path = write_config(folder, tiny_config(folder, name="failed"))
    assert exit_code_of(["python", str(FAULTY_RUN), "fail:2", str(path)], full_disk()) == 1
    log = (folder / "runs" / "failed" / "logs" / "rank-00000.log").read_text()
    assert log.count("Traceback (most recent call last)") == 1 and "RuntimeError: made to fail" in log
    assert read_status(folder / "runs" / "failed")["status"] == "failed"


def test_a_bus_error_leaves_a_traceback_in_the_log(folder):
    path = write_config(folder, tiny_config(folder, name="truncated"))
    with open(os.devnull, "w") as nowhere:
        assert start(["python", str(FAULTY_RUN), "bus:2", str(path)], nowhere, nowhere).wait(TIMEOUT) == -signal.SIGBUS
    log = folder / "runs" / "truncated" / "logs" / "rank-00000.log"
    wait_for(lambda: "Fatal Python error: Bus error" in log.read_text() and "faulty_run.py" in log.read_text())


def test_the_last_output_of_an_aborting_library_is_on_the_console_and_in_the_log(folder):
    path = write_config(folder, tiny_config(folder, name="aborted"))
    errors, log = folder / "errors.txt", folder / "runs" / "aborted" / "logs" / "rank-00000.log"
    with open(errors, "w") as file, open(os.devnull, "w") as output:
        assert start(["python", str(FAULTY_RUN), "abort:2", str(path)], output, file).wait(TIMEOUT) == -signal.SIGABRT
    for file in (errors, log):
        wait_for(lambda file=file: file.read_text().count("a library aborts: ") == 1)
    printed = log.read_text()
    assert printed.index(f"step {1:>6}") < printed.index("a library aborts: ")
