"""How the transformer layers are run: computed again in the backward pass, or compiled. What they compute stays the same."""

import logging
import os
from collections.abc import Callable

import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from pretrain.models.language_model import LanguageModel

GRAPHS_OF_A_KIND = 8
"""Graphs that torch._dynamo may make for the layers of one shape: for training, validation and checkpointing, and for each mask of Gemma 2."""


def enable_activation_checkpointing(model: LanguageModel) -> None:
    """Keep the input of each layer only, and compute the layer again in the backward pass."""
    # not reentrant: that would run ZeRO-3's gradient hooks in a backward pass for each layer, and forbid torch.autograd.grad
    model.causal_lm.activation_checkpointing_enable({"use_reentrant": False})


def mark_layers_as_z3_leaves(model: LanguageModel) -> None:
    """Let ZeRO stage 3 gather and release the parameters of a layer together, by one hook instead of one for each linear map and norm.

    To be called before DeepSpeed is initialised.
    """
    set_z3_leaf_modules(model, list({type(layer) for layer in model.causal_lm.model.layers}))


def compile_layers(model: LanguageModel) -> None:
    """Compile the layers alone: the numbers of labels and pairs differ from batch to batch, the tokens' shapes do not.

    To be called before DeepSpeed is initialised. One graph serves all layers of a kind. Under ZeRO stage 3 they must be gathered whole: hooks
    inside a layer would break its graph at each linear map.
    """
    for layer in model.causal_lm.model.layers:
        layer.forward = torch.compile(
            layer.forward, dynamic=False
        )  # not the call, which runs the hooks around the layer


def raise_recompile_limit(model: LanguageModel, warn: Callable[[str], None]) -> None:
    """Let torch._dynamo compile every layer, or the FlexAttention of every layer; call `warn` once if it does not.

    Its limit is one for all layers, since they share their code, and those of OpenELM have different shapes.
    """
    limit = GRAPHS_OF_A_KIND * len({_shape(layer) for layer in model.causal_lm.model.layers})
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, limit)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, limit)
    messages = logging.getLogger("torch._dynamo.convert_frame")
    for handler in [handler for handler in messages.handlers if isinstance(handler, _LimitReached)]:
        messages.removeHandler(handler)  # of an earlier run in this process
    messages.addHandler(_LimitReached(warn))


def limit_compile_threads(ranks: int) -> None:
    """Let each of the `ranks` on this machine start its share of torch._inductor's compile workers, not as many as there are cores."""
    settings = torch._inductor.config
    share = max(1, len(os.sched_getaffinity(0)) // ranks)
    settings.compile_threads = min(settings.compile_threads or share, share)


def _shape(layer: nn.Module) -> tuple[tuple[int, int], ...]:
    """Return what distinguishes the layers of OpenELM from each other."""
    return tuple(
        (module.in_features, module.out_features) for module in layer.modules() if isinstance(module, nn.Linear)
    )


class _LimitReached(logging.Handler):
    """Turns the message by which torch._dynamo reports that it reached its limit into a warning, once."""

    def __init__(self, warn: Callable[[str], None]):
        super().__init__()
        self._warn: Callable[[str], None] | None = warn

    def emit(self, record: logging.LogRecord) -> None:
        """Pass the message on; ignore all others."""
        message = " ".join(record.getMessage().split())
        if self._warn and message.startswith("torch._dynamo hit config."):
            self._warn(
                f"WARNING: some layers run without being compiled, and more slowly: {message[:300]}; TORCH_LOGS=recompiles prints the reasons"
            )
            self._warn = None
