"""The base class of objectives, their construction from a configuration, and the normalisation of the loss."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from data_prep.utils.console import UserError
from pretrain.data.batch import Batch
from pretrain.data.loader import Unit
from pretrain.objectives.configs import ObjectiveConfig
from pretrain.objectives.pool import Gather, Pool


class OutputHead(Protocol):
    """Functions of the language model that an objective may call."""

    def cross_entropy(self, hidden: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        """Return the sum of the cross-entropies of the next tokens, in nats: (M, D), (M,) -> scalar."""

    def kl_divergence(self, hidden: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Return the sum of the divergences of the next-token distributions: (M, D), (M, D) -> scalar."""


@dataclass(frozen=True)
class ForwardPass:
    """A micro batch and the hidden states that the model computed for it."""

    batch: Batch
    hidden: torch.Tensor
    """(B * L, D) last-layer hidden states after the final norm."""
    layers: Mapping[int, torch.Tensor]
    """(B * L, D) hidden states after each layer that the objective reads (`Objective.layers`)."""
    head: OutputHead
    gather: Gather


class ObjectiveOutput(NamedTuple):
    """The result of one forward pass."""

    terms: dict[str, torch.Tensor]
    """This rank's sum of each term over the micro batch, fp32 scalars."""
    pool: Pool | None
    """The pairs of all ranks; None if they were not gathered."""


class Term(NamedTuple):
    """A term of the loss."""

    weight: float
    unit: Unit
    """Unit over which the term is summed, as the function that counts it: `count_targets`, `count_pairs`,
    `count_spans` or `count_ends` of pretrain/data/loader.py, or a function in the file of the objective."""


Z_LOSS = "z"
"""Name of the term of the z-loss, (log Z)^2. The head adds its gradient to the gradient of `lm`."""


class ModelShape(NamedTuple):
    """The sizes of the model that an objective with weights needs."""

    width: int
    """Width D of the hidden states."""
    layers: int


class Objective(nn.Module, ABC):
    """A weighted sum of terms.

    An objective may have weights: its submodules are trained, saved and exported with the model. Under
    ZeRO stage 3 all ranks must call the same submodules in every forward pass, with an empty input if there is nothing
    to compute.
    """

    layers: tuple[int, ...] = ()
    """Numbers of the layers whose hidden states the objective reads, from 1; 0 is the input of the first layer."""

    def __init__(self, terms: Mapping[str, Term]):
        super().__init__()
        self.weights: Mapping[str, float] = {name: term.weight for name, term in terms.items()}
        self.units: Mapping[str, Unit] = {name: term.unit for name, term in terms.items()}

    def add_z_loss(self, coefficient: float) -> None:
        """Add the term of the z-loss, with the unit of `lm`. The value and the gradient come from the head."""
        self.weights = {**self.weights, Z_LOSS: coefficient * self.weights["lm"]}
        self.units = {**self.units, Z_LOSS: self.units["lm"]}

    @abstractmethod
    def forward(self, forward_pass: ForwardPass, *, with_pool: bool = False) -> ObjectiveOutput:
        """Return the terms of a micro batch.

        With `with_pool`, the pairs are gathered even if no term needs them.
        """

    def predict(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the predictions of target embeddings from the embeddings of the contexts: (P, D) -> (P, D)."""
        return embeddings

    def flops(self, counts: Mapping[str, float], head: int) -> float:
        """Return the FLOPs of the objective's weights in a step, forward and backward.

        `counts` has the count of each term, and `head` is the number of parameters of the output head. The terms
        themselves are not counted, as they need few FLOPs compared with the model.
        """
        return 0.0

    def activation_bytes(self, counts: Mapping[str, float], item_bytes: int) -> float:
        """Return the bytes that the objective's modules store for the backward pass of a micro batch.

        `counts` has the count of each term in it, and `item_bytes` is the size of an element of the weights.
        """
        return 0.0


def build_objective(config: ObjectiveConfig, shape: ModelShape) -> Objective:
    """Return the objective of a configuration, by calling `from_config` of the module `pretrain.objectives.NAME`.

    The weights are initialised from torch's generator. Raises UserError if the model lacks a layer that the objective
    reads.
    """
    module = importlib.import_module(f"pretrain.objectives.{config.name}")
    objective: Objective = module.from_config(config, shape)
    if missing := [number for number in objective.layers if not 0 <= number <= shape.layers]:
        raise UserError(
            f"objective: {config.name} reads the hidden states of layer {missing[0]}, but the model has {shape.layers} "
            "layers; choose one of them"
        )
    return objective


def total_loss(
    terms: Mapping[str, torch.Tensor], counts: Mapping[str, int], weights: Mapping[str, float], ranks: int
) -> torch.Tensor:
    """Return the loss to differentiate on one rank: the sum over terms of ranks * weight * sum / count.

    `counts` has the count of each term over the whole global batch. The factor `ranks` is needed because DeepSpeed
    averages gradients over ranks. The averaged gradient then equals the gradient of the global batch.
    """
    first, *others = [weights[name] / max(1, counts[name]) * value for name, value in terms.items()]
    return ranks * sum(others, start=first)
