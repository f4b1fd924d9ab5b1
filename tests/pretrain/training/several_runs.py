"""Several runs one after another in the same ranks, to save start-ups: `several_runs.py CONFIG ...`.

With `nan:CONFIG`, rank 1's JEPA term of the third step is not a number. With `compiled:CONFIG`, compiling a layer more than
twice, once for training and once for validation, is an error.
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


def limit_compilations() -> None:
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 2
    torch._dynamo.config.fail_on_recompile_limit_hit = True


for word in sys.argv[1:]:
    if word.startswith("--local_rank"):
        continue
    if word.startswith("nan:"):
        spoil_third_call()
    if word.startswith("compiled:"):
        limit_compilations()
    run(load_config(word.removeprefix("nan:").removeprefix("compiled:")))
