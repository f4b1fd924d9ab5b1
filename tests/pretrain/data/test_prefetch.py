"""Prefetching yields the steps, states and errors of the loader unchanged, and its thread ends."""

import subprocess
import sys
import threading
import time
from dataclasses import fields
from itertools import count

import numpy as np
import pytest
import torch

from data_prep.layout import Pairing, make_layout
from data_prep.utils.console import UserError
from pretrain.data import prefetch
from pretrain.data.batch import Batch, micro_batches
from pretrain.data.loader import Loader, count_pairs, count_targets
from pretrain.data.prefetch import PREFETCH_STEPS, Prefetch
from tests.commands import environment
from tests.processes import TIMEOUT, wait_for

UNITS = {"lm": count_targets, "jepa": count_pairs}
CPU = torch.device("cpu")


@pytest.fixture
def loader(corpus, specials) -> Loader:
    return Loader(corpus, make_layout("joint", specials, pairing=Pairing(1)), 128, seed=5, dropout=0.3, epochs=2)


def batches_of(loader: Loader, specials):
    return lambda rows: micro_batches(
        rows, loader.corpus, loader.layout, specials, 128, micro_batch_rows=2, rank=1, ranks=2
    )


def prefetch_threads() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


def assert_same(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


def test_steps_and_states_equal_the_ones_of_the_loader(loader, specials, corpus):
    plain = Loader(corpus, loader.layout, 128, seed=5, dropout=0.3, epochs=2)
    with Prefetch(loader, 8, batches_of(loader, specials), UNITS, CPU) as steps:
        while not plain.exhausted:
            rows, step = plain.next_rows(8), steps.next()
            np.testing.assert_array_equal(step.rows.records, rows.records)
            assert step.state == plain.state() and step.targets == count_targets(rows, plain.layout)
            assert step.loss_denominators == {"lm": step.targets, "jepa": count_pairs(rows, plain.layout)}
            expected = list(batches_of(plain, specials)(rows))
            assert len(step.batches) == len(expected) == 2
            for one, other in zip(step.batches, expected, strict=True):
                assert_same(one, other)
        with pytest.raises(ValueError, match="exhausted"):
            steps.next()


def test_a_stopped_run_resumes_with_the_first_step_not_taken(loader, specials, corpus):
    with Prefetch(loader, 8, batches_of(loader, specials), UNITS, CPU) as steps:
        taken = [steps.next() for _ in range(3)]
        following = steps.next()
    assert loader.state() != taken[-1].state, "the thread should be ahead"
    resumed = Loader(corpus, loader.layout, 128, seed=5, dropout=0.3, epochs=2)
    resumed.load_state(taken[-1].state)
    with Prefetch(resumed, 8, batches_of(resumed, specials), UNITS, CPU) as steps:
        again = steps.next()
    np.testing.assert_array_equal(again.rows.records, following.rows.records)
    assert_same(again.batches[0], following.batches[0])


def test_the_number_of_prefetched_steps_is_limited(loader, specials):
    made = []

    def counted(rows):
        made.append(rows)
        return batches_of(loader, specials)(rows)

    with Prefetch(loader, 8, counted, UNITS, CPU) as steps:
        for taken in (0, 1, 2):
            wait_for(lambda taken=taken: len(made) >= taken + PREFETCH_STEPS)
            time.sleep(0.05)  # enough time to make one more step
            assert len(made) == taken + PREFETCH_STEPS
            steps.next()


def test_an_error_is_raised_unchanged_at_its_step_and_known_before(loader, specials):
    number = count(1)

    def damaged(rows):
        if next(number) == 3:
            raise UserError("the shard x is damaged")
        return batches_of(loader, specials)(rows)

    with Prefetch(loader, 8, damaged, UNITS, CPU) as steps:
        assert not steps.failed() and steps.next() and not steps.failed() and steps.next()
        assert steps.failed()
        with pytest.raises(UserError, match=r"^the shard x is damaged$"):
            steps.next()


class Clock:
    """A clock that only the test advances."""

    def __init__(self):
        self.now, self.was_read = 0.0, threading.Event()

    def perf_counter(self) -> float:
        self.was_read.set()
        return self.now


def test_the_time_spent_waiting_for_data_is_measured(loader, specials, monkeypatch):
    clock, number = Clock(), count(1)
    monkeypatch.setattr(prefetch, "time", clock)

    def late(rows):
        if next(number) == 1:
            assert clock.was_read.wait(TIMEOUT), "no call waits for the step"
            clock.now += 7
        return batches_of(loader, specials)(rows)

    with Prefetch(loader, 8, late, UNITS, CPU) as steps:
        steps.next()
        assert steps.pop_wait_seconds() == 7
        clock.now += 100  # spent on the step
        steps.next()
        assert steps.pop_wait_seconds() == 0


def test_the_thread_ends_with_the_run_or_its_error(loader, specials):
    before = prefetch_threads()
    with pytest.raises(KeyError), Prefetch(loader, 8, batches_of(loader, specials), UNITS, CPU):
        assert prefetch_threads() == before + 1
        raise KeyError
    assert prefetch_threads() == before


@pytest.mark.parametrize(
    "end", ["raise RuntimeError", "sys.exit(3)", "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"]
)
def test_the_thread_does_not_block_the_exit_of_the_process(end, tmp_path):
    """The process exits without closing the prefetcher."""
    code = f"""
import os, signal, sys, time, types
import torch
from pretrain.data.prefetch import Prefetch
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
class Endless:
    exhausted = False
    def next_rows(self, count):
        time.sleep(0.1)
        raise ValueError
steps = Prefetch(Endless(), 1, list, dict(), torch.device("cpu"))
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), timeout=TIMEOUT, capture_output=True)
    assert done.returncode == (1 if "raise" in end else 3), done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_on_cuda_batches_are_pinned(loader, specials):
    device = torch.device("cuda:0")
    with Prefetch(loader, 8, batches_of(loader, specials), device) as steps:
        [batch, _] = steps.next().batches
    plain = next(
        iter(batches_of(loader, specials)(Loader(loader.corpus, loader.layout, 128, seed=5, dropout=0.3).next_rows(8)))
    )
    assert batch.token_ids.is_pinned() and batch.pair_valid.is_pinned()
    assert_same(batch, plain)
    moved = batch.to(device)
    torch.cuda.synchronize()
    assert torch.equal(moved.token_ids.cpu(), plain.token_ids)
