"""Bitwise comparison of two checkpoints."""

import json
from pathlib import Path

import numpy as np
import torch


def equal(one, other) -> bool:
    """Return whether two nested states are bitwise equal."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return one == other or type(one).__module__.startswith("deepspeed")


def assert_same_checkpoints(one: Path, other: Path) -> None:
    """Assert that weights, optimizer, random states and progress are equal on every rank; elapsed time may differ."""
    files = sorted(path.name for path in one.glob("*.pt"))
    assert files == sorted(path.name for path in other.glob("*.pt")) and files
    for file in files:
        first, second = (torch.load(folder / file, weights_only=False) for folder in (one, other))
        assert equal(first, second), file
    first, second = (json.loads((folder / "manifest.json").read_text())["state"] for folder in (one, other))
    for state in (first, second):
        state["progress"].pop("seconds")
        state["progress"].pop("processor_seconds")
        state.pop("owed")  # a pending validation does not change the training state
    assert first == second
