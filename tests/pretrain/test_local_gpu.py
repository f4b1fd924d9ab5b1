"""Which GPU a rank takes."""

import pytest

from data_prep.console import UserError
from pretrain.local_gpu import gpu_index


def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_it_sees():
    assert [gpu_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [gpu_index(rank, 1) for rank in range(4)] == [0, 0, 0, 0], "with --gpus-per-task=1 Slurm shows each rank its own GPU as number 0"


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(UserError, match="LOCAL_RANK=2 sees 2 GPUs"):
        gpu_index(2, 2)
