"""The control flow of benchmarks/gpu.py, on CPU with a tiny model."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks import gpu, gpu_corpus
from tests.commands import BackgroundCommand, run_command
from tests.processes import wait_for


def run(tmp_path, *words: str) -> dict:
    completed = run_command([sys.executable, "benchmarks/gpu.py", "--small", "--work", str(tmp_path), *words])
    results = json.loads(completed.stdout)
    lines = {
        line.split()[1]: line
        for line in completed.stderr.splitlines()
        if line.startswith(("pass", "none", "fail", "broken", "ran "))
    }
    assert lines.keys() == results["checks"].keys()
    return results["checks"]


def test_checks_run_together_with_the_checks_that_they_need(tmp_path):
    checks = run(tmp_path, "--checks", "train", "head", "attention")
    assert {name: check["result"] for name, check in checks.items()} == {
        "corpus": "pass",
        "attention": "none",
        "train": "ran",
        "head": "pass",
    }
    assert checks["train"]["figures"]["last_loss"] < checks["train"]["figures"]["first_loss"]
    assert checks["head"]["figures"]["sizes"]["2^14"]["error_of_weight_gradient"] < 5e-3
    assert "gpu_runs.py" in (tmp_path / checks["train"]["log"]).read_text()


@pytest.mark.slow
def test_every_check_runs_on_two_ranks(tmp_path):
    checks = run(tmp_path, "--ranks", "2", "--seconds", "3000")
    assert len(checks) == 12 and {check["result"] for name, check in checks.items() if name != "attention"} <= {
        "pass",
        "ran",
    }, checks
    assert checks["objectives"]["figures"].keys() >= {"next_token", "joint", "independent"}


def bench(tmp_path, seconds: float = 100.0):
    return gpu.Bench(tmp_path, 1, True, time.monotonic() + seconds)


def test_a_broken_check_does_not_end_the_other_checks(tmp_path, monkeypatch):
    def fails(bench):
        bench.call([sys.executable, "-c", "raise ValueError('the kernel is missing')"])

    checks = {
        "first": (fails, 50, ()),
        "second": (lambda bench: {}["x"], 50, ()),
        "third": (lambda bench: ({"speed": 1.5}, False, "too slow"), 50, ()),
        "fourth": (fails, 50, ("first",)),
        "fifth": (fails, 50, ("third",)),
    }
    monkeypatch.setattr(gpu, "CHECKS", checks)
    current = bench(tmp_path)
    for name in checks:
        current.results[name] = gpu.run_check(current, name)
    assert [check["result"] for check in current.results.values()] == ["broken", "broken", "fail", "none", "broken"]
    assert "exit code 1: ValueError: the kernel is missing" in current.results["first"]["meaning"]
    assert gpu.check_line("third", current.results["third"]) == "fail    third         speed 1.5: too slow"


def test_a_check_ends_at_its_time_limit_and_no_check_starts_without_enough_time(tmp_path, monkeypatch):
    def sleeps(bench):
        bench.call([sys.executable, "-c", "import time; time.sleep(3600)"])

    monkeypatch.setattr(gpu, "CHECKS", {"hangs": (sleeps, 1, ()), "late": (sleeps, 1000, ())})
    current = bench(tmp_path)
    assert gpu.run_check(current, "hangs")["meaning"] == "not finished within 1 s"
    assert gpu.run_check(current, "late")["meaning"] == "needs 333 s, but only 99 s are left"


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_killing_a_command_kills_its_child_processes():
    """Include processes in their own session, like the ranks of torchrun."""
    code = "import subprocess, time; subprocess.Popen(['sleep', '3600'], start_new_session=True); time.sleep(3600)"
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: psutil.Process(process.pid).children())
    (started,) = psutil.Process(process.pid).children()
    gpu.kill_process_tree(process)
    wait_for(lambda: has_ended(started))
    assert process.returncode is not None


@pytest.mark.parametrize(
    ("result", "code"),
    [
        ((lambda bench: ({}, True, "fine")), 0),
        ((lambda bench: ({}, None, "ran")), 0),
        ((lambda bench: ({}, False, "bad")), 1),
        ((lambda bench: {}["x"]), 1),
    ],
)
def test_the_exit_code_shows_whether_all_checks_passed(tmp_path, monkeypatch, capsys, result, code):
    monkeypatch.setattr(gpu, "CHECKS", {"one": (result, 5, ())})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--work", str(tmp_path), "--checks", "one"])
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as exit_info:
        gpu.main()
    assert exit_info.value.code == code
    found = json.loads(capsys.readouterr().out)
    assert json.loads(next(tmp_path.glob("*/results.json")).read_text())["checks"] == found["checks"]


def test_a_signal_ends_the_check_and_prints_the_results_so_far(tmp_path):
    running = BackgroundCommand(
        [sys.executable, "benchmarks/gpu.py", "--small", "--work", str(tmp_path), "--checks", "corpus"],
        tmp_path / "log",
    )
    running.wait_until(
        lambda: any(tmp_path.glob("*/corpus.log")) and psutil.Process(running.process.pid).children(), "a check"
    )
    started = psutil.Process(running.process.pid).children(recursive=True)
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 130
    wait_for(lambda: all(map(has_ended, started)))
    printed = running.log.read_text()
    assert json.loads(printed[printed.index("{") : printed.rindex("}") + 1])["interrupted"]


@pytest.mark.parametrize(
    "words", [["--ranks", "0"], ["--seconds", "nan"], ["--seconds", "-5"], ["--checks", "none"], ["--work", "/proc/x"]]
)
def test_invalid_command_line_options_are_reported(words):
    completed = run_command([sys.executable, "benchmarks/gpu.py", "--small", *words], check=False)
    assert completed.returncode == 2 and "error:" in completed.stderr and "Traceback" not in completed.stderr


def test_an_untested_version_is_reported(tmp_path):
    machine = gpu.describe_machine()
    assert len(list(gpu.machine_lines(machine, bench(tmp_path)))) == 1
    other = list(gpu.machine_lines(machine | {"torch": "2.14.0+cu130"}, bench(tmp_path)))
    assert other[1] == "note: the installed torch is 2.14.0+cu130; the project is tested with 2.13.0"


def test_record_lengths_of_the_corpus_are_as_different_as_in_real_documents():
    records = [gpu_corpus.record(number, 128_000, 4096) for number in range(400)]
    lengths = [sum(len(text.split()) for text in record.values()) for record in records]
    assert min(lengths) < 250 and max(lengths) > 3500
    assert sum(len(record) == 2 for record in records) == 200
    joint_lengths = [
        len(record["context"].split()) + 2 * len(record["target"].split()) + 6 for record in records if len(record) == 2
    ]
    assert max(joint_lengths) <= 4096, "a joint record and the copy of its target must fit in a row"
