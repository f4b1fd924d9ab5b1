"""Which GPU a rank takes."""

import os

import pytest
import torch

from data_prep.console import UserError
from pretrain.local_gpu import gpu_index, select_gpu


def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_it_sees():
    assert [gpu_index({"LOCAL_RANK": str(rank)}, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [gpu_index({"LOCAL_RANK": str(rank)}, 1) for rank in range(4)] == [0, 0, 0, 0], "Slurm's --gpus-per-task"


@pytest.mark.parametrize("size", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"])
def test_more_ranks_than_gpus_are_refused_on_all_of_them(size):
    """Also on rank 0, which is the one that speaks."""
    for rank in range(3):
        with pytest.raises(UserError, match="3 ranks on a machine with 2 GPUs"):
            gpu_index({"LOCAL_RANK": str(rank), size: "3"}, 2)


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (4, 3)])
def test_deepspeed_is_told_by_the_local_rank(monkeypatch, visible, index):
    """It takes cuda:LOCAL_RANK by itself in several places."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert select_gpu() == index and chosen == [index] and os.environ["LOCAL_RANK"] == str(index)
