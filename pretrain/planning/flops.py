"""Parameter counts of a model, its FLOPs, and the peak FLOP/s of devices."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from pretrain.models.hidden_matrices import full_shape
from pretrain.models.language_model import LanguageModel
from pretrain.objectives.base import Objective

ITERATIONS = 5
"""Iterations of Newton-Schulz in a step of Muon."""
PEAK_BF16_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
}
"""Dense bf16 peak in FLOP/s by the full name of a device, from its manufacturer's data sheet. Other devices have no
MFU, because a guessed peak would be misleading."""


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters of a module, partitioned or not."""
    return sum(full_shape(parameter).numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by part of the model."""

    layers: int
    """Transformer layers and final norm."""
    embedding: int
    """Embeddings of tokens and, if the model has learned ones, of positions."""
    head: int
    """Output head; its parameters are in the embedding if they are tied."""
    tied: bool
    predictor: int
    """Embedding of the predictor tokens."""
    objective: int = 0
    """Weights of the objective."""

    @property
    def total(self) -> int:
        """Number of all parameters; tied ones count once."""
        return self.layers + self.embedding + (0 if self.tied else self.head) + self.predictor + self.objective

    def flops(self, positions: float, targets: float) -> tuple[float, float]:
        """Return the FLOPs of the layers and of the output head, forward and backward.

        The layers need 6 FLOPs per position and parameter, and the head 6 per next-token target and parameter
        (Kaplan et al., arXiv 2001.08361, section 2.1). Attention scores and padding are not counted.
        """
        return 6 * self.layers * positions, 6 * self.head * targets


def count_parameters(model: LanguageModel, objective: Objective) -> Parameters:
    """Return the parameter counts of a model and its objective, which may be partitioned or on the meta device."""
    tables = [module for module in model.transformer.modules() if isinstance(module, nn.Embedding)]
    embedding = sum(parameter_count(table) for table in tables)
    tied = model.head.weight is model.causal_lm.get_input_embeddings().weight
    head = full_shape(model.head.weight).numel() if tied else parameter_count(model.head)
    predictor = 0 if model.predictor is None else parameter_count(model.predictor)
    layers = parameter_count(model) - predictor - embedding - (0 if tied else head)
    return Parameters(layers, embedding, head, tied, predictor, parameter_count(objective))


def muon_flops(shapes: Iterable[torch.Size]) -> float:
    """Return the FLOPs of a step of Muon for matrices of these shapes.

    With m <= n, an iteration has two products of (m, m) with n columns, 4 m^2 n, and one of (m, m) with m, 2 m^3.
    """
    sides = [sorted(shape) for shape in shapes]
    return float(sum(ITERATIONS * (4 * short**2 * long + 2 * short**3) for short, long in sides))


def peak_flops() -> float | None:
    """Return the dense bf16 peak of this device in FLOP/s; None if it is not known."""
    return PEAK_BF16_FLOPS.get(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
