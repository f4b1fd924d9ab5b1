"""Gradient diagnostics: the norm of each loss term's gradient, and its cosine with the next-token loss's gradient."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from pretrain.data.batch import Batch
from pretrain.objectives.base import Z_LOSS, total_loss
from pretrain.training.distributed import World

REFERENCE = "lm"
"""The term with which the other terms are compared."""


def gradient_diagnostics(
    module: nn.Module,
    batches: Sequence[Batch],
    counts: Mapping[str, int],
    weights: Mapping[str, float],
    world: World,
    report_progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return the norms and cosines of the terms' gradients over the global batch, by metric tag.

    `batches` are this rank's micro batches. A term's gradient is the gradient of weight * sum / count, so the sum of
    these gradients is the gradient of the loss. The gradient of `lm` includes the z-loss. A term with a count of 0 is
    absent. A cosine is NaN if a gradient is zero, and all values are NaN if a term is not finite.

    The cost is a forward and a backward pass over the global batch for each term, and memory for two fp32 gradients
    divided by the number of ranks. DeepSpeed's accumulated gradients and the random number generators do not change.
    `report_progress` is called before each micro batch.
    """
    values: dict[str, float] = {}
    norms: dict[str, float] = {}
    reference: list[torch.Tensor] = []
    measured = [name for name in weights if counts[name] and name != Z_LOSS]
    for name in sorted(measured, key=lambda name: name != REFERENCE):
        term_weights = {other: weight if other == name else 0.0 for other, weight in weights.items()}
        gradient = _gradient(module, batches, counts, term_weights, world, report_progress)
        reference = reference or gradient
        square, product = world.sum([_dot(gradient, gradient), _dot(gradient, reference)])
        values[f"gradient/norm/{name}"] = norms[name] = square**0.5
        if name != REFERENCE:
            scale = norms[name] * norms[REFERENCE]
            values[f"gradient/cosine/{name}"] = product / scale if scale else float("nan")
    return values


def _gradient(
    module: nn.Module,
    batches: Sequence[Batch],
    counts: Mapping[str, int],
    weights: Mapping[str, float],
    world: World,
    report_progress: Callable[[], None],
) -> list[torch.Tensor]:
    """Return this rank's part of the gradient of the global batch, one flat fp32 tensor for each parameter."""
    parameters = list(module.parameters())
    parts: list[torch.Tensor | float] = [0.0] * len(parameters)

    def accumulate(index: int, gradient: torch.Tensor) -> torch.Tensor:
        parts[index] = parts[index] + world.reduce_scatter(gradient.float())
        # replaces the gradient, so no rank ever stores the complete gradient
        return gradient.new_zeros(()).expand_as(gradient)

    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        for batch in batches:
            report_progress()
            # terms of weight zero stay in the graph, because ZeRO-3 must see the same modules as in every backward pass
            loss = total_loss(module(batch.to(world.device)).terms, counts, weights, ranks=1)
            hooks = [parameter.register_hook(partial(accumulate, index)) for index, parameter in enumerate(parameters)]
            # unlike backward(), this does not run the hooks of DeepSpeed's gradient accumulation
            torch.autograd.grad(loss, parameters, allow_unused=True)
            for hook in hooks:
                hook.remove()
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _dot(one: list[torch.Tensor], other: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.dot(left, right).double() for left, right in zip(one, other, strict=True)]).sum()
