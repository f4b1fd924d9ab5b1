"""A second signal ends a rank immediately, except in the grace period, when launchers repeat the first signal."""

import signal
import subprocess
import sys

import pytest

from tests.commands import ROOT, environment
from tests.processes import TIMEOUT

RANK = """
import os, sys
from pretrain.training.stop import StopRequest

class EchoingStop(StopRequest):
    GRACE = 3600.0

    def _receive(self, number):
        super()._receive(number)
        os.write(1, b"received\\n")

stop = EchoingStop()
os.write(1, b"up\\n")
sys.stdin.readline()
EchoingStop.GRACE = 0.0
os.write(1, b"the grace period is over\\n")
sys.stdin.readline()
"""
IN_A_COLLECTIVE = """
import os, torch, torch.distributed as dist
from datetime import timedelta
from pretrain.training.stop import StopRequest

class StopWithoutGrace(StopRequest):
    GRACE = 0.0

rank = int(os.environ["RANK"])
store = dist.FileStore(os.environ["STORE"], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(days=1))
dist.barrier()
stop = StopWithoutGrace()
print("up", flush=True)
if rank == 1:
    input()  # the peer waits for this rank
else:
    dist.all_reduce(torch.zeros(1))
"""


def start(code: str, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(**variables),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_ends_the_rank_but_a_repeated_one_does_not(number):
    rank = start(RANK)
    assert rank.stdout.readline() == "up\n"
    for _ in range(2):
        rank.send_signal(number)
        assert rank.stdout.readline() == "received\n"
    rank.stdin.write("\n")
    rank.stdin.flush()
    assert rank.stdout.readline() == "the grace period is over\n"
    rank.send_signal(number)
    assert rank.wait(TIMEOUT) == 128 + number
    assert rank.stderr.read().count("saving and stopping") == 1


def test_a_second_signal_ends_a_rank_that_waits_in_a_collective(tmp_path):
    ranks = [start(IN_A_COLLECTIVE, RANK=str(rank), STORE=str(tmp_path / "store")) for rank in range(2)]
    waiting = ranks[0]
    try:
        for rank in ranks:
            while (line := rank.stdout.readline()) != "up\n":
                assert line, "the rank ended early"
        waiting.send_signal(signal.SIGTERM)
        while "saving and stopping" not in (line := waiting.stderr.readline()):
            assert line, "the first signal ended the rank"
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(TIMEOUT) == 128 + signal.SIGTERM
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_a_signal_is_recorded_even_if_its_message_cannot_be_written():
    script = """
import signal, time
from pretrain.training.stop import StopRequest

stop = StopRequest()
signal.raise_signal(signal.SIGTERM)
while stop.received is None:
    time.sleep(0.01)
"""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=ROOT, env=environment(), stderr=full, timeout=TIMEOUT)
    assert done.returncode == 0
