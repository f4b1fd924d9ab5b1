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
        self._model.causal_lm.lm_head.measures_logits = True

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

    def take(self, objective: Objective, world: World) -> dict[str, float]:
        """Return the measurements of the step by metric tag, and end measuring. All ranks must call this together.

        Call it between the last backward pass and the update.
        """
        assert self._sums is not None, "begin() has not been called"
        gradients = gradient_squares(self._model, objective, world)
        totals = world.sum([*gradients.values(), *self._sums.values()])
        gradient_totals = dict(zip(gradients, totals, strict=False))
        sums = dict(zip(self._sums, totals[len(gradients) :], strict=True))
        self._sums = None
        self._model.causal_lm.lm_head.measures_logits = False
        positions, targets, log_z, logits = (sums.pop(name) for name in ("positions", "targets", "log_z", "logits"))
        elements, targets = max(1, positions) * self._model.hidden_size, max(1, targets)
        return (
            {f"{LAYERS}gradient_norm/{part}": square**0.5 for part, square in gradient_totals.items()}
            | {f"{LAYERS}activation_rms/{part}": (square / elements) ** 0.5 for part, square in sums.items()}
            | {"logits/rms": (logits / targets / self._model.vocab_size) ** 0.5, "logits/log_z": log_z / targets}
        )


def gradient_squares(model: LanguageModel, objective: Objective, world: World) -> dict[str, torch.Tensor]:
    """Return the sum of squares of this rank's part of the accumulated gradient, by part of the model.

    The parts are disjoint. Weights of a tied head belong to the embedding, and frozen weights are not included.
    """
    get_accelerator().synchronize()  # offloaded gradients may still be on their way to the host
    squares: dict[str, torch.Tensor] = {}
    counted: set[int] = set()
    for part, module in _parts(model, objective):
        for parameter in module.parameters():
            if parameter.requires_grad and id(parameter) not in counted:
                counted.add(id(parameter))
                norm = torch.linalg.vector_norm(_local_gradient(parameter, world), dtype=torch.float32)
                squares[part] = squares.get(part, 0.0) + norm.double().square().to(world.device)
    return squares


def _parts(model: LanguageModel, objective: Objective) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of the model in the order of the forward pass. The last one has all modules without a part."""
    yield EMBEDDING, model.causal_lm.get_input_embeddings()
    if model.predictor is not None:
        yield "predictor", model.predictor
    for number, layer in enumerate(model.causal_lm.model.layers, start=1):
        yield str(number), layer
    yield "head", model.causal_lm.lm_head
    yield "objective", objective
    yield "norm", model


def _local_gradient(parameter: Any, world: World) -> torch.Tensor:
    """Return this rank's part of the gradient of a parameter, averaged over ranks and accumulated over micro batches.

    `parameter` is typed Any, because DeepSpeed adds attributes to it.
    """
    if hasattr(parameter, "ds_id"):  # partitioned by ZeRO stage 3; the partition of the last rank may be padded
        start = world.rank * parameter.partition_numel()
        return safe_get_local_grad(parameter).flatten()[: max(0, parameter.ds_numel - start)]
    if parameter._hp_mapping is None:  # this rank has no part of the parameter
        return torch.zeros(0, device=world.device)
    return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
