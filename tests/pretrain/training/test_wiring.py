"""Every option of the configuration reaches the object that it configures."""

from tests.commands import run_command


def test_options_reach_the_objects_that_they_configure():
    done = run_command(["python", "-m", "pytest", "-q", "tests/pretrain/training/wiring_checks.py"], check=False)
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout[-6000:]
