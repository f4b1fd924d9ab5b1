"""Several runs one after another in the same ranks, to save start-ups: `several_runs.py CONFIG ...`.

With `nan:CONFIG`, rank 1's JEPA term of the third step is not a number.
"""

import sys

import torch
import torch.distributed as dist

import pretrain.objectives.llm_jepa as llm_jepa
from pretrain.config import load_config
from pretrain.training.main import run


def spoil_third_call() -> None:
    whole, calls = llm_jepa.cosine_distance, 0

    def spoiled(*arguments):
        nonlocal calls
        calls += 1
        return whole(*arguments) * (torch.nan if calls == 3 and dist.get_rank() == 1 else 1.0)

    llm_jepa.DISTANCES["cosine"] = spoiled


for word in sys.argv[1:]:
    if word.startswith("--local_rank"):
        continue
    if word.startswith("nan:"):
        spoil_third_call()
    run(load_config(word.removeprefix("nan:")))
