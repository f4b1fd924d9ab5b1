"""Semantic Tube Prediction: hidden states of a text move along a straight line.

Huang, LeCun and Balestriero, arXiv 2602.22617: 1 - cos(h_t - h_r, h_r - h_s) on the hidden states of the ordinary
language-model pass, at positions s < r < t of one document. It needs no views and no additional tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pretrain.data.loader import count_spans
from pretrain.objectives.auxiliary import AuxiliaryObjective
from pretrain.objectives.base import ForwardPass, ModelShape, Term
from pretrain.objectives.configs.semantic_tube import Config
from pretrain.objectives.pool import Pool
from pretrain.objectives.regularizers import Regularizer, build_regularizers


def tube_distance(stretches: torch.Tensor) -> torch.Tensor:
    """Return 1 - cos between the first step and the sum of the other two, (S,).

    A step is the difference of hidden states over a stretch. `stretches` (S, 3, 2, D) has the hidden states at the ends
    of the three stretches of each span.
    """
    steps = stretches[:, :, 1] - stretches[:, :, 0]
    return 1 - F.cosine_similarity(steps[:, 0], steps[:, 1] + steps[:, 2], dim=-1)


class SemanticTube(AuxiliaryObjective):
    """The language-model loss plus `weight` times the curvature of the path of hidden states."""

    def __init__(self, weight: float, regularizers: Sequence[Regularizer] = ()):
        super().__init__({"jepa": Term(weight, count_spans)}, regularizers)

    def auxiliary_sums(
        self, forward_pass: ForwardPass, prediction: torch.Tensor, target: torch.Tensor, pool: Pool | None
    ) -> dict[str, torch.Tensor]:
        """Return this rank's sum of the tube distances of its spans."""
        return {"jepa": tube_distance(forward_pass.hidden[forward_pass.batch.span_index].float()).sum()}


def from_config(config: Config, shape: ModelShape) -> SemanticTube:
    """Return the objective of a configuration."""
    return SemanticTube(config.weight, build_regularizers(config.regularizers))
