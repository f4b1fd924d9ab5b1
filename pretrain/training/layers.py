"""How the transformer layers are run: computed again in the backward pass, or compiled. What they compute stays the same."""

import torch
from deepspeed.utils import set_z3_leaf_modules

from pretrain.models.language_model import LanguageModel


def recompute_layers(model: LanguageModel) -> None:
    """Keep the input of each layer only, and compute the layer again in the backward pass."""
    # not reentrant: that would run ZeRO-3's gradient hooks in a backward pass for each layer, and forbid torch.autograd.grad
    model.causal_lm.activation_checkpointing_enable({"use_reentrant": False})


def compile_layers(model: LanguageModel, zero_stage: int) -> None:
    """Compile the layers alone: the numbers of labels and pairs differ from batch to batch, the tokens' shapes do not.

    To be called before DeepSpeed is initialised. One graph serves all layers of a kind.
    """
    layers = model.causal_lm.model.layers
    if zero_stage == 3:
        # hooks inside a layer would break its graph at each linear map: gather its parameters as one instead
        set_z3_leaf_modules(model, list({type(layer) for layer in layers}))
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)  # not the call, which runs the hooks around the layer
