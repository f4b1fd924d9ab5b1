"""Write the gathered initial weights of each rank: `initial_weights.py CONFIG ...`."""

import sys

import deepspeed
from safetensors.torch import save_file

from pretrain.config import load_config
from pretrain.training.distributed import init_world
from pretrain.training.setup import set_up

world = init_world()
for argument in sys.argv[1:]:
    if argument.startswith("--local_rank"):
        continue
    config = load_config(argument)
    module = set_up(config, world).engine.module
    state = {}
    for name, parameter in module.named_parameters():
        assert parameter.numel() == 0, f"{name} is not partitioned"
        with deepspeed.zero.GatheredParameters(parameter):
            state[name.removeprefix("model.")] = parameter.detach().clone()
    state |= {name.removeprefix("model."): buffer.clone() for name, buffer in module.named_buffers()}
    save_file(state, config.run_dir / f"initial-{world.rank}.safetensors")
