"""Semantic Tube Prediction: hidden states of a text move along a straight line.

Huang, LeCun and Balestriero, arXiv 2602.22617: 1 - cos(h_t - h_r, h_r - h_s) on the hidden states of the ordinary language-model
pass, at positions s < r < t of one document. It needs no views and no further tokens.
"""

from typing import Literal

import torch
import torch.nn.functional as F

from pretrain.data.batch import Batch
from pretrain.data.layout import Pairing, SpanForm
from pretrain.objectives.auxiliary import AuxiliaryConfig, AuxiliaryObjective
from pretrain.objectives.pool import Pool
from pretrain.objectives.regularizers import Regularizer


class Config(AuxiliaryConfig):
    """Next-token loss plus weight times the bend of the hidden states' path. Published weights are 0.005 to 0.04."""

    name: Literal["semantic_tube"]
    """Semantic Tube Prediction (arXiv 2602.22617)."""
    form: SpanForm = "three_points"
    """three_points: the paper's, at three random positions. sub_span: the released code's, a random span against what is left of the
    document. views: along the first view, then along the second; layout joint only."""

    @property
    def spans(self) -> SpanForm:
        return self.form

    @property
    def pairing(self) -> Pairing | None:
        return Pairing() if self.regularizers else None  # they look at pairs; the term does not

    def build(self) -> "SemanticTube":
        return SemanticTube(self.weight, [regularizer.build() for regularizer in self.regularizers])


def tube_distance(stretches: torch.Tensor) -> torch.Tensor:
    """1 - cos between the first step and the sum of the others: hidden states (S, 3, 2, D) at the ends of three stretches -> (S,)."""
    steps = stretches[:, :, 1] - stretches[:, :, 0]
    return 1 - F.cosine_similarity(steps[:, 0], steps[:, 1] + steps[:, 2], dim=-1)


class SemanticTube(AuxiliaryObjective):
    """The language-model loss and `weight` times the bend."""

    def __init__(self, weight: float, regularizers: list[Regularizer] = ()):
        super().__init__(weight, "spans", list(regularizers))

    def auxiliary_sum(self, hidden: torch.Tensor, prediction: torch.Tensor, target: torch.Tensor, batch: Batch, pool: Pool | None) -> torch.Tensor:
        return tube_distance(hidden[batch.span_index].float()).sum()
