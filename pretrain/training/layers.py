"""Execution of the transformer layers: activation checkpointing, compilation, and gathering under ZeRO stage 3.

None of these changes what the layers compute.
"""

import logging
import os

import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from pretrain.models.language_model import LanguageModel

logger = logging.getLogger(__name__)

GRAPHS_PER_SHAPE = 8
"""Number of graphs that torch._dynamo may create for layers of one shape. Training, validation and checkpointing need
separate graphs, and each mask of Gemma 2 needs one too."""


def enable_activation_checkpointing(model: LanguageModel) -> None:
    """Make the model keep only the input of each layer, and recompute the layer in the backward pass."""
    # The reentrant variant would run ZeRO-3's gradient hooks in a separate backward pass for each layer. It does not
    # support torch.autograd.grad either.
    model.causal_lm.activation_checkpointing_enable({"use_reentrant": False})


def mark_layers_as_z3_leaves(model: LanguageModel) -> None:
    """Make ZeRO stage 3 gather and release the parameters of a layer together.

    This needs one hook per transformer layer instead of one per linear layer and norm. Call it before DeepSpeed is
    initialised.
    """
    set_z3_leaf_modules(model, list({type(layer) for layer in model.layers}))


def compile_layers(model: LanguageModel) -> None:
    """Compile the layers only: the shape of their input is fixed, but the numbers of labels and pairs vary by batch.

    Call it before DeepSpeed is initialised. All layers of the same shape share one graph. Under ZeRO stage 3 each
    layer must be gathered as one unit, because hooks inside a layer would break its graph at each linear layer.
    """
    for layer in model.layers:
        # compiles forward() and not __call__, because __call__ runs the hooks around the layer
        layer.forward = torch.compile(layer.forward, dynamic=False)


def raise_recompile_limit(model: LanguageModel) -> None:
    """Raise torch._dynamo's limit to allow compiling every layer, or the FlexAttention of every layer.

    The layers share their code and therefore one limit, and the layers of OpenELM have different shapes. If the
    limit is reached nevertheless, there is one warning.
    """
    limit = GRAPHS_PER_SHAPE * len({_shape(layer) for layer in model.layers})
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, limit)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, limit)
    messages = logging.getLogger("torch._dynamo.convert_frame")
    for handler in [handler for handler in messages.handlers if isinstance(handler, _LimitReached)]:
        messages.removeHandler(handler)  # added by an earlier run in this process
    messages.addHandler(_LimitReached())


def limit_compile_threads(ranks: int) -> None:
    """Divide torch._inductor's compile workers, by default one per core, among the `ranks` of this machine."""
    settings = torch._inductor.config
    per_rank = max(1, len(os.sched_getaffinity(0)) // ranks)
    settings.compile_threads = min(settings.compile_threads or per_rank, per_rank)


def _shape(layer: nn.Module) -> tuple[tuple[int, int], ...]:
    """Return the input and output widths of the linear layers in a layer; the layers of OpenELM differ in them."""
    return tuple(
        (module.in_features, module.out_features) for module in layer.modules() if isinstance(module, nn.Linear)
    )


class _LimitReached(logging.Handler):
    """A log handler that turns torch._dynamo's message about a reached limit into a warning, once."""

    def __init__(self) -> None:
        super().__init__()
        self._warned = False

    def emit(self, record: logging.LogRecord) -> None:
        """Warn if the record is that message; ignore all other records."""
        message = " ".join(record.getMessage().split())
        if not self._warned and message.startswith("torch._dynamo hit config."):
            self._warned = True
            logger.warning(
                f"some layers run uncompiled, and more slowly: {message[:300]}; set TORCH_LOGS=recompiles to "
                "see the reasons"
            )
