"""Next-latent prediction: an MLP predicts the next hidden state from the current one and the next token.

Teoh et al., arXiv 2511.05963: L = L_LM + weight * smooth_l1(q_(t+1), sg[h_(t+1)]) + kl_weight * KL(p_(t+1) || r_(t+1)),
with q_(t+1) = h_t + MLP(norm([e_(t+1), h_t])). h_t is the last hidden state, e_(t+1) the embedding of the next token,
and sg stops the gradient. p_(t+1) and r_(t+1) are the next-token distributions that the output head computes from
sg[h_(t+1)] and from q_(t+1); no gradient flows into the head. Prediction is one step ahead. Both terms are averaged
over the next-token targets, so both states always belong to one text.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.data.loader import count_targets
from pretrain.objectives.auxiliary import AuxiliaryObjective
from pretrain.objectives.base import ForwardPass, ModelShape, Term
from pretrain.objectives.configs.nextlat import Config
from pretrain.objectives.mlp import Mlp
from pretrain.objectives.pool import Pool
from pretrain.objectives.regularizers import Regularizer, build_regularizers

TOKEN_EMBEDDINGS = 0
"""Number of the layer whose states are the inputs of the first layer."""


class NextLat(AuxiliaryObjective):
    """The language-model loss plus the error of the predicted next hidden state, in one or two terms."""

    layers = (TOKEN_EMBEDDINGS,)

    def __init__(self, weight: float, kl_weight: float, width: int, regularizers: Sequence[Regularizer] = ()):
        terms = {"jepa": Term(weight, count_targets)}
        if kl_weight:
            terms["kl"] = Term(kl_weight, count_targets)
        super().__init__(terms, regularizers)
        self.norm = nn.LayerNorm(2 * width)
        self.dynamics = Mlp(2 * width, width, width, width)

    def auxiliary_sums(
        self, forward_pass: ForwardPass, prediction: torch.Tensor, target: torch.Tensor, pool: Pool | None
    ) -> dict[str, torch.Tensor]:
        """Return this rank's sums over its next-token targets."""
        predicting = forward_pass.batch.label_index
        current = forward_pass.hidden[predicting]
        following = forward_pass.hidden[predicting + 1].detach()
        tokens = forward_pass.layers[TOKEN_EMBEDDINGS][predicting + 1]
        predicted = current.float() + self.dynamics(self.norm(torch.cat([tokens, current], dim=1)))
        errors = F.smooth_l1_loss(predicted, following.float(), reduction="none").mean(dim=1)
        sums = {"jepa": errors.sum()}
        if "kl" in self.weights:
            sums["kl"] = forward_pass.head.kl_divergence(predicted.to(following.dtype), following)
        return sums

    def flops(self, counts: Mapping[str, float], head: int) -> float:
        """Return the FLOPs of the MLP, and with the KL term of three products with the head; see `Objective`."""
        return self.dynamics.flops(counts["jepa"]) + 6 * head * counts.get("kl", 0.0)

    def activation_bytes(self, counts: Mapping[str, float], item_bytes: int) -> float:
        """Return the bytes that the MLP, its norm and the fp32 states of the error store; see `Objective`."""
        width = self.dynamics.widths[-1]
        in_fp32 = counts["jepa"] * 4 * 2 * width
        norm = counts["jepa"] * item_bytes * 2 * width
        kl = counts.get("kl", 0.0) * item_bytes * width
        return self.dynamics.activation_bytes(counts["jepa"], item_bytes) + in_fp32 + norm + kl


def from_config(config: Config, shape: ModelShape) -> NextLat:
    """Return the objective of a configuration."""
    return NextLat(config.weight, config.kl_weight, shape.width, build_regularizers(config.regularizers))
