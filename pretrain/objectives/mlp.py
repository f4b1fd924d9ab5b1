"""A multilayer perceptron that an objective owns, such as a projector or a predictor."""

from itertools import pairwise

import torch
from torch import nn


class Mlp(nn.Module):
    """Linear layers of the given widths, with GELU between them.

    The weights have torch's initialisation. The input is converted to the type of the weights, and the output is fp32.
    """

    def __init__(self, *widths: int):
        super().__init__()
        self.widths = widths
        linear = [nn.Linear(before, after) for before, after in pairwise(widths)]
        self.layers = nn.Sequential(linear[0], *(module for later in linear[1:] for module in (nn.GELU(), later)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs: (M, widths[0]) -> (M, widths[-1])."""
        weight = self.layers[0].weight
        assert isinstance(weight, torch.Tensor)
        outputs: torch.Tensor = self.layers(inputs.to(weight.dtype))
        return outputs.float()

    def flops(self, rows: float) -> float:
        """Return the FLOPs for a number of input rows, forward and backward: 6 per row and weight."""
        return 6 * rows * sum(before * after for before, after in pairwise(self.widths))

    def activation_bytes(self, rows: float, item_bytes: int) -> float:
        """Return the bytes stored for the backward pass: the inputs of the linear layers and of GELU."""
        return rows * item_bytes * (self.widths[0] + 2 * sum(self.widths[1:-1]))
