"""Resume a run with fused AdamW, as on GPUs: `fused_resume.py CONFIG`.

After loading, print the settings of its parameter groups as JSON.
"""

import json
import sys

import torch

from pretrain.config import load_config
from pretrain.training.distributed import init_world
from pretrain.training.setup import set_up

AdamW = torch.optim.AdamW
torch.optim.AdamW = lambda *arguments, **options: AdamW(*arguments, **options | {"fused": True})
trainer = set_up(load_config(sys.argv[-1]), init_world())
assert trainer is not None and trainer.progress.step == 2
optimizer = trainer.engine.optimizer.optimizer
print(
    json.dumps([{key: group[key] for key in ("fused", "weight_decay", "betas")} for group in optimizer.param_groups]),
    flush=True,
)
trainer.train()
