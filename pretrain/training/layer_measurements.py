"""Measurements of the layers in a step: norms of gradients, and the scales of activations and logits.

They are sums over the global batch. Gradients are read between the last backward pass and the update, so they are not
clipped yet.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_local_grad
from torch import nn

from pretrain.data.batch import Batch
from pretrain.models.language_model import LanguageModel
from pretrain.models.layer_states import LayerStates
from pretrain.objectives.base import Objective
from pretrain.run_folder import EMBEDDING, LAYERS
from pretrain.training.distributed import World


class LayerMeasurements:
    """The sums of squares of hidden states and logits over the forward passes of a step.

    Create it before DeepSpeed is initialised. Only passes between `begin` and `take` are measured, and only their
    forward pass: activation checkpointing runs the layers again in the backward pass.
    """

    def __init__(self, model: LanguageModel):
        self._model = model
        self._pad_id: int = model.causal_lm.config.pad_token_id
        self._states = LayerStates(model, range(model.shape.layers + 1))
        self._sums: dict[str, torch.Tensor] | None = None

    def begin(self) -> None:
        """Measure the following forward passes."""
        self._sums = {}
        self._model.head.measures_logits = True

    @contextmanager
    def record(self, batch: Batch) -> Iterator[None]:
        """Add the forward pass in this context, if it is to be measured."""
        if self._sums is None:
            yield
            return
        with self._states.record() as states:
            yield
        occupied = (batch.token_ids != self._pad_id).flatten()
        sums = {"positions": occupied.sum(), "targets": torch.tensor(len(batch.label_ids), device=occupied.device)}
        for number, layer in states.items():
            norms = torch.linalg.vector_norm(layer.detach(), dim=1, dtype=torch.float32)
            sums[str(number) if number else EMBEDDING] = norms.square().where(occupied, 0.0).sum()
        _, sums["log_z"], sums["logits"] = self._model.head_sums
        self._sums = {name: self._sums.get(name, 0.0) + value.double() for name, value in sums.items()}

    def take(self, objective: Objective, zero: Any, world: World) -> dict[str, float]:
        """Return the measurements of the step by metric tag, and end measuring. All ranks must call this together.

        Call it between the last backward pass and the update. `zero` is DeepSpeed's optimizer.
        """
        assert self._sums is not None, "begin() has not been called"
        gradients = gradient_squares(self._model, objective, zero, world)
        totals = world.sum([*gradients.values(), *self._sums.values()])
        gradient_totals = dict(zip(gradients, totals, strict=False))
        sums = dict(zip(self._sums, totals[len(gradients) :], strict=True))
        self._sums = None
        self._model.head.measures_logits = False
        positions, targets, log_z, logits = (sums.pop(name) for name in ("positions", "targets", "log_z", "logits"))
        elements, targets = max(1, positions) * self._model.hidden_size, max(1, targets)
        return (
            {f"{LAYERS}gradient_norm/{part}": square**0.5 for part, square in gradient_totals.items()}
            | {f"{LAYERS}activation_rms/{part}": (square / elements) ** 0.5 for part, square in sums.items()}
            | {"logits/rms": (logits / targets / self._model.vocab_size) ** 0.5, "logits/log_z": log_z / targets}
        )


def gradient_squares(model: LanguageModel, objective: Objective, zero: Any, world: World) -> dict[str, torch.Tensor]:
    """Return the sum of squares of this rank's part of the accumulated gradient, by part of the model.

    `zero` is DeepSpeed's optimizer. The parts are disjoint. Weights of a tied head belong to the embedding, and frozen
    weights are not included.
    """
    get_accelerator().synchronize()  # offloaded gradients may still be on their way to the host
    gradients = dict(_local_gradients(zero, world))
    squares: dict[str, torch.Tensor] = {}
    counted: set[int] = set()
    for part, module in _parts(model, objective):
        for parameter in module.parameters():
            if not parameter.requires_grad or id(parameter) in counted:
                continue
            counted.add(id(parameter))
            square = torch.zeros((), dtype=torch.float64, device=world.device)
            if (gradient := gradients.get(id(parameter))) is not None:
                square += torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square().to(world.device)
            squares[part] = squares[part] + square if part in squares else square
    return squares


def _parts(model: LanguageModel, objective: Objective) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of the model in the order of the forward pass. The last one has all modules without a part."""
    yield EMBEDDING, model.causal_lm.get_input_embeddings()
    if model.predictor is not None:
        yield "predictor", model.predictor
    for number, layer in enumerate(model.layers, start=1):
        yield str(number), layer
    yield "head", model.head
    yield "objective", objective
    yield "norm", model


def _local_gradients(zero: Any, world: World) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the id of each parameter of which this rank has a part, and its part of the gradient.

    Gradients are averaged over ranks and accumulated over micro batches.
    """
    if hasattr(zero, "fp16_partitioned_groups_flat"):  # ZeRO stage 3, which pads the partition of the last rank
        for group in zero.fp16_groups:
            for parameter in group:
                start = world.rank * parameter.partition_numel()
                size = max(0, parameter.ds_numel - start)
                yield id(parameter), safe_get_local_grad(parameter).flatten()[:size]
        return
    if hasattr(zero, "fp32_groups_gradients"):  # stage 1 in bf16: every rank has the complete gradients
        for group, gradients in zip(zero.bf16_groups, zero.fp32_groups_gradients, strict=True):
            for parameter, gradient in zip(group, gradients, strict=True):
                if world.is_main:
                    yield id(parameter), gradient
        return
    stored = zero.offload_gradient_dict if zero.cpu_offload else zero.averaged_gradients
    for number, group in enumerate(zero.params_in_partition):
        unpadded = (gradient for gradient in stored[number] if not getattr(gradient, "_zero_padding", False))
        for parameter, gradient in zip(group, unpadded, strict=False):  # an empty group has a gradient of zeros
            yield id(parameter), gradient
