"""A second signal ends a rank at once, but not within the seconds in which launchers repeat the first one."""

import signal
import subprocess
import sys
import time

import pytest

from tests.launching import ROOT, environment

RANK = """
import time
from pretrain.training.stop import StopRequest
StopRequest.GRACE = 2.0
stop = StopRequest()
print("up", flush=True)
until = time.monotonic() + 60
while time.monotonic() < until:
    time.sleep(0.1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_ends_the_rank_but_a_repeated_one_does_not(number):
    rank = subprocess.Popen([sys.executable, "-c", RANK], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert rank.stdout.readline() == "up\n"
    for _ in range(2):
        rank.send_signal(number)
        time.sleep(0.3)
    assert rank.poll() is None
    time.sleep(2)
    rank.send_signal(number)
    assert rank.wait(10) in (-number, 1)  # Python makes an exception of SIGINT
    assert rank.stderr.read().count("is to save and stop") == 1
