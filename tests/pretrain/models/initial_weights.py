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
    model = set_up(config, world).engine.module.model
    state = {}
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 0, f"{name} is not partitioned"
        with deepspeed.zero.GatheredParameters(parameter):
            state[name] = parameter.detach().clone()
    state |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    save_file(state, config.run_dir / f"initial-{world.rank}.safetensors")
