"""A second signal ends a rank at once, but not within the seconds in which launchers repeat the first one."""

import signal
import subprocess
import sys

import pytest

from tests.launching import ROOT, environment
from tests.processes import TIMEOUT

RANK = """
import os, sys
from pretrain.training.stop import StopRequest

class Heard(StopRequest):
    GRACE = 3600.0

    def _receive(self, number, frame):
        super()._receive(number, frame)
        os.write(1, b"heard\\n")

stop = Heard()
os.write(1, b"up\\n")
sys.stdin.readline()
Heard.GRACE = 0.0
os.write(1, b"the seconds are over\\n")
sys.stdin.readline()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_ends_the_rank_but_a_repeated_one_does_not(number):
    rank = subprocess.Popen([sys.executable, "-c", RANK], cwd=ROOT, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)
    assert rank.stdout.readline() == "up\n"
    for _ in range(2):
        rank.send_signal(number)
        assert rank.stdout.readline() == "heard\n"
    rank.stdin.write("\n")
    rank.stdin.flush()
    assert rank.stdout.readline() == "the seconds are over\n"
    rank.send_signal(number)
    assert rank.wait(TIMEOUT) in (-number, 1)  # Python makes an exception of SIGINT
    assert rank.stderr.read().count("is to save and stop") == 1
