"""The states of all random number generators of a rank, saved as a file of a checkpoint."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def random_state_file_name(rank: int) -> str:
    """Return the file name of a rank's state."""
    return f"random_rank_{rank:05d}.pt"


def seed_all(seed: int) -> None:
    """Seed all random number generators of this rank."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Return the states of the generators of Python, NumPy, torch and the rank's accelerator."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_random_state(checkpoint: Path, rank: int) -> None:
    """Restore the generators of a rank from a checkpoint. Without a saved state, the generators do not change."""
    path = checkpoint / random_state_file_name(rank)
    if not path.exists():
        return
    state = torch.load(path, weights_only=False)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
