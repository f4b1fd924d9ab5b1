"""The choice of a GPU for each rank."""

import os

import pytest
import torch

from data_prep.utils.console import UserError
from pretrain.local_gpu import gpu_index, select_gpu


def test_a_rank_uses_the_gpu_of_its_local_rank_or_the_only_visible_one():
    assert [gpu_index({"LOCAL_RANK": str(rank)}, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [gpu_index({"LOCAL_RANK": str(rank)}, 1) for rank in range(4)] == [0, 0, 0, 0], (
        "one visible GPU, as with --gpus-per-task of Slurm"
    )


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"])
def test_more_ranks_than_gpus_are_refused_on_every_rank(variable):
    """Rank 0 must fail too, because only rank 0 prints the error."""
    for rank in range(3):
        with pytest.raises(UserError, match="3 ranks on a machine with 2 GPUs"):
            gpu_index({"LOCAL_RANK": str(rank), variable: "3"}, 2)


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (4, 3)])
def test_the_selected_gpu_is_written_to_local_rank(monkeypatch, visible, index):
    """DeepSpeed itself uses cuda:LOCAL_RANK in several places."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert select_gpu() == index and chosen == [index] and os.environ["LOCAL_RANK"] == str(index)
