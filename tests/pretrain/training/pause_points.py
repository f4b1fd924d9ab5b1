"""Runs that wait at a chosen point, so a test can act at that point on a machine of any speed.

A waiting rank continues when it gets a signal to stop, or when the test has created `release_file(config, step)`.
"""

import time
from pathlib import Path

from pretrain.training import checkpoint, loop, setup
from pretrain.training.stop import StopRequest


def release_file(config: Path, step: int) -> Path:
    """Return the file that lets the run of a configuration continue with a step as soon as the file exists."""
    return config.with_suffix(f".go-{step}")


def hold_steps(config: Path, steps: list[int]) -> None:
    """Wait at the beginning of each of these steps; step 0 means before the model is built."""
    StopRequest.GRACE = 3600.0  # a launcher may forward a signal late
    count, set_up = loop.Trainer._count, setup.set_up

    def held_count(self, rows):
        count(self, rows)
        if self.progress.step in steps:
            _wait(self.stop, release_file(config, self.progress.step), self.report_progress)

    def held_set_up(run, world, stop, *arguments):
        print("waiting before the start", flush=True)
        _wait(stop, release_file(config, 0))
        return set_up(run, world, stop, *arguments)

    loop.Trainer._count = held_count
    if 0 in steps:
        setup.set_up = held_set_up


def hold_validation(step: int) -> None:
    """Wait in the validation of a step until any rank has received a signal."""
    asked_to_stop = loop.Trainer.stop_requested

    def held(self):
        if self.progress.step == step and self.world.is_main:
            print(f"waiting in the validation of step {step}", flush=True)
        while not (stopping := asked_to_stop(self)) and self.progress.step == step:
            time.sleep(0.05)
        return stopping

    loop.Trainer.stop_requested = held


def hold_save(step: int) -> None:
    """Write the checkpoint files of a step, and wait to be killed before they are published as a checkpoint."""
    publish = checkpoint.publish

    def held(temporary, number, *arguments):
        while number == step:
            time.sleep(0.05)
        publish(temporary, number, *arguments)

    checkpoint.publish = held


def _wait(stop: StopRequest, file: Path, moved=lambda: None) -> None:
    while stop.received is None and not file.exists():
        moved()
        time.sleep(0.01)
