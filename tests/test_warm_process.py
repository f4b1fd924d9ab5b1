"""A command that is started warm behaves like one that is started cold."""

import json
import signal
import subprocess
import sys

import psutil
import pytest

from tests.commands import ROOT, BackgroundCommand, environment, ranks_command, run_command
from tests.processes import wait_for

PRINT_CONTEXT = (
    "import json, os, sys\n"
    "leads_session = os.getsid(0) == os.getpid()\n"
    "print(json.dumps([sys.argv, os.getcwd(), os.environ.get('JEPA_TRIAL'), leads_session]))"
)
SLEEP = "import time; print('up', flush=True); time.sleep(3600)"
STARTS_A_COMMAND = f"""
import subprocess, sys
from tests.commands import start
process = start(["python", "-c", {SLEEP!r}], sys.stdout, sys.stderr)
print(process.pid, flush=True)
process.wait()
"""


def test_a_warm_command_has_the_arguments_folder_environment_and_session_of_a_cold_one(tmp_path):
    script = tmp_path / "show.py"
    script.write_text(PRINT_CONTEXT)
    commands = [
        ["python", str(script), "a", "b c"],
        ["python", "-c", PRINT_CONTEXT, "a"],
        ["python", "-m", "json.tool", "--help"],
        ["python", "launcher/run.py", "configs/demo.yaml", "train.stepz=3"],
        ["python", "-c", "import sys; sys.exit(7)"],
        ["python", "-c", "raise ValueError('no')"],
    ]
    for command in commands:
        warm, cold = (run_command(command, check=False, cold=cold, JEPA_TRIAL="1") for cold in (False, True))
        assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout), command
        assert warm.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:], command


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_signal_ends_a_warm_command_like_a_cold_one(tmp_path, number):
    codes = []
    for cold in (False, True):
        log = tmp_path / f"{cold}.log"
        running = BackgroundCommand(["python", "-c", SLEEP], log, cold)
        running.wait_until(lambda log=log: "up" in log.read_text(), "its first line")
        running.process.send_signal(number)
        codes.append(running.end())
    assert codes == [-number, -number]


def test_ranks_get_their_environment_and_the_first_failure_is_the_exit_code(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import json, os, sys\n"
        "values = {name: os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')}\n"
        "print(json.dumps(values | {'argv': sys.argv[1:]}))\n"
        "sys.exit(5 * int(os.environ['RANK']) if 'fail' in sys.argv else 0)"
    )
    completed = run_command(ranks_command(2, script, "word"))
    printed = sorted((json.loads(line) for line in completed.stdout.splitlines()), key=lambda values: values["RANK"])
    assert printed == [
        {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "argv": [f"--local_rank={rank}", "word"]}
        for rank in (0, 1)
    ]
    assert run_command(ranks_command(2, script, "fail"), check=False).returncode == 5


def test_a_warm_command_ends_with_the_process_that_started_it():
    tests = subprocess.Popen(
        [sys.executable, "-c", STARTS_A_COMMAND], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    command = psutil.Process(int(tests.stdout.readline().removeprefix("up\n") or tests.stdout.readline()))
    tests.kill()
    tests.wait()
    wait_for(lambda: not command.is_running() or command.status() == psutil.STATUS_ZOMBIE)
    assert tests.returncode == -signal.SIGKILL
