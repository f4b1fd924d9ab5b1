"""Train several runs in the same ranks, which saves start-up time: `several_runs.py CONFIG ...`.

With `nan:CONFIG`, the JEPA term of the third step is NaN on rank 1. With `compiled:CONFIG`, it is an error if a layer
is compiled more than twice: once for training and once for validation.
"""

import sys

import torch
import torch.distributed as dist

import pretrain.objectives.llm_jepa as llm_jepa
from data_prep.utils.console import show_messages
from pretrain.config import load_config
from pretrain.training.main import run


def make_third_call_nan() -> None:
    original, calls = llm_jepa.cosine_distance, 0

    def distance(*arguments):
        nonlocal calls
        calls += 1
        return original(*arguments) * (torch.nan if calls == 3 and dist.get_rank() == 1 else 1.0)

    llm_jepa.DISTANCES["cosine"] = distance


def limit_compilations() -> None:
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 2
    torch._dynamo.config.fail_on_recompile_limit_hit = True


show_messages()
for argument in sys.argv[1:]:
    if argument.startswith("--local_rank"):
        continue
    if argument.startswith("nan:"):
        make_third_call_nan()
    if argument.startswith("compiled:"):
        limit_compilations()
    run(load_config(argument.removeprefix("nan:").removeprefix("compiled:")))
