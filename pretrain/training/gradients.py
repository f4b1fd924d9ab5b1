"""How the loss terms pull on the weights: the norm of each term's gradient, and its cosine with that of the next-token loss."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from pretrain.data.batch import Batch
from pretrain.objectives.base import total_loss
from pretrain.training.distributed import World

REFERENCE = "lm"
"""The term that the others are compared with."""


def gradient_diagnostics(
    module: nn.Module,
    batches: Sequence[Batch],
    counts: Mapping[str, int],
    weights: Mapping[str, float],
    world: World,
    report_progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return norm and cosine of the terms' gradients over the global batch, keyed like the metric tags.

    `batches` are this rank's micro batches. A gradient is that of weight * sum / count, so together they are that of the loss. A term
    with a count of 0 is absent. A cosine is NaN where a gradient is zero, and everything is where a term is not finite. Costs a
    forward and a backward pass over the global batch for each term, and memory for two fp32 gradients divided by the ranks. What
    DeepSpeed has accumulated and the random numbers to come stay as they are. `moved` is called before each micro batch.
    """
    values: dict[str, float] = {}
    norms: dict[str, float] = {}
    reference: list[torch.Tensor] = []
    for name in sorted((name for name in weights if counts[name]), key=lambda name: name != REFERENCE):
        alone = {other: weight if other == name else 0.0 for other, weight in weights.items()}
        gradient = _gradient(module, batches, counts, alone, world, report_progress)
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
    """Return the gradient of the global batch, of each parameter the part that falls to this rank, flat and in fp32."""
    parameters = list(module.parameters())
    parts: list[torch.Tensor | float] = [0.0] * len(parameters)

    def take(index: int, gradient: torch.Tensor) -> torch.Tensor:
        parts[index] = parts[index] + world.reduce_scatter(gradient.float())
        return gradient.new_zeros(()).expand_as(gradient)  # in its place, so that no rank ever holds a whole gradient

    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        for batch in batches:
            report_progress()
            # the terms of weight zero stay in the graph: ZeRO-3 then meets the same modules as in every other backward pass
            loss = total_loss(module(batch.to(world.device)).terms, counts, weights, ranks=1)
            hooks = [parameter.register_hook(partial(take, index)) for index, parameter in enumerate(parameters)]
            torch.autograd.grad(
                loss, parameters, allow_unused=True
            )  # runs no hook of DeepSpeed's gradient accumulation
            for hook in hooks:
                hook.remove()
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _dot(one: list[torch.Tensor], other: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.dot(left, right).double() for left, right in zip(one, other, strict=True)]).sum()
