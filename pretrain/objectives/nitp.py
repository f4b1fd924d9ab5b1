"""Next implicit token prediction: the last hidden state predicts a shallow hidden state of the next token.

Zhang et al., arXiv 2605.24956, equations 2 and 3: L = L_LM + lambda * (1 - cos(P(h_t), sg[z_(t+1)])). h_t is the last
hidden state, P a projection by an MLP, z_(t+1) the hidden state of the next token after a shallow layer, and sg stops
the gradient. The term is averaged over the next-token targets, so h_t and z_(t+1) always belong to one text.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from pretrain.data.loader import count_targets
from pretrain.objectives.auxiliary import AuxiliaryObjective
from pretrain.objectives.base import ForwardPass, ModelShape, Term
from pretrain.objectives.configs.nitp import Config
from pretrain.objectives.mlp import Mlp
from pretrain.objectives.pool import Pool
from pretrain.objectives.regularizers import Regularizer, build_regularizers


class Nitp(AuxiliaryObjective):
    """The language-model loss plus `weight` times the cosine distance to the shallow state of the next token."""

    def __init__(self, weight: float, layer: int, projector: Mlp, regularizers: Sequence[Regularizer] = ()):
        super().__init__({"jepa": Term(weight, count_targets)}, regularizers)
        self.layers = (layer,)
        self.projector = projector

    def auxiliary_sums(
        self, forward_pass: ForwardPass, prediction: torch.Tensor, target: torch.Tensor, pool: Pool | None
    ) -> dict[str, torch.Tensor]:
        """Return this rank's sum of the distances over its next-token targets."""
        predicting = forward_pass.batch.label_index
        (shallow,) = forward_pass.layers.values()
        projected = self.projector(forward_pass.hidden[predicting])
        similarity = F.cosine_similarity(projected, shallow[predicting + 1].detach().float(), dim=-1)
        return {"jepa": (1 - similarity).sum()}

    def flops(self, counts: Mapping[str, float], head: int) -> float:
        """Return the FLOPs of the projector; see `Objective`."""
        return self.projector.flops(counts["jepa"])

    def activation_bytes(self, counts: Mapping[str, float], item_bytes: int) -> float:
        """Return the bytes that the projector and the fp32 states of the cosine store; see `Objective`."""
        in_fp32 = 2 * self.projector.widths[-1]
        return self.projector.activation_bytes(counts["jepa"], item_bytes) + 4 * in_fp32 * counts["jepa"]


def from_config(config: Config, shape: ModelShape) -> Nitp:
    """Return the objective of a configuration."""
    return Nitp(
        config.weight,
        config.layer or shallow_layer(shape.layers),
        Mlp(shape.width, shape.width, shape.width),
        build_regularizers(config.regularizers),
    )


def shallow_layer(layers: int) -> int:
    """Return the number of the layer at 20% of the depth, the paper's choice; the first layer is 1."""
    return max(1, round(0.2 * layers))
