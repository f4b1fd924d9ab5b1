"""LLM-JEPA: next-token loss plus a distance between the predicted and the actual embedding of the other view.

Huang, LeCun and Balestriero, arXiv 2509.14252, equation 2: L = L_LM + lambda * d(Pred(Enc(context)), Enc(target)).
In the published form gradients flow into both sides; there is no projector and no moving average.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from pretrain.data.batch import Batch
from pretrain.data.layout import Pairing
from pretrain.objectives.auxiliary import AuxiliaryConfig, AuxiliaryObjective
from pretrain.objectives.pool import Pool, own_share
from pretrain.objectives.regularizers import Regularizer

DEFAULT_TEMPERATURE = 0.07


class Config(AuxiliaryConfig):
    """Next-token loss plus weight times the distance between the predicted and the actual embedding of the other view."""

    name: Literal["llm_jepa"]
    """LLM-JEPA (arXiv 2509.14252)."""
    predictor_tokens: int = Field(default=1, ge=0, le=12)
    """k: predictor tokens at the context; 0 reads the context's own last token."""
    predictor_placement: Literal["append", "prepend"] = "append"
    """append: behind the context. prepend: before a copy of it, which costs the context's tokens a second time."""
    direction: Literal["forward", "backward", "both"] = "forward"
    """forward: each view predicts the next one (the description predicts the regex). backward: the one before it. both: two pairs."""
    distance: Literal["cosine", "l2", "mse", "info_nce"] = "cosine"
    """cosine: the paper's 1 - cos. l2: the Euclidean distance. mse: the mean squared difference of the components. info_nce:
    contrastive, against all targets of the micro step over all ranks."""
    temperature: float | None = Field(default=None, gt=0)
    """Of info_nce; default 0.07."""
    stop_gradient: bool = False
    """Whether the target is held fixed; the published form trains both sides."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Loss dropout: the share of records that sit out the pair terms in an epoch."""

    @model_validator(mode="after")
    def _can_act(self) -> "Config":
        if self.temperature is not None and self.distance != "info_nce":
            raise ValueError("temperature acts on distance info_nce only; leave it out")
        if self.predictor_placement == "prepend" and not self.predictor_tokens:
            raise ValueError("predictor_placement acts on predictor tokens, but predictor_tokens is 0; leave it out")
        if self.direction != "forward" and self._is_symmetric and not (self.direction == "both" and self.regularizers):
            raise ValueError("direction acts with predictor tokens, info_nce or stop_gradient; here the term is the same both ways: leave it out")
        return self

    @property
    def _is_symmetric(self) -> bool:
        """Whether prediction and target could be exchanged."""
        return self.predictor_tokens == 0 and self.distance != "info_nce" and not self.stop_gradient

    @property
    def pairing(self) -> Pairing:
        return Pairing(self.predictor_tokens, self.predictor_placement, self.direction)

    @property
    def record_dropout(self) -> float:
        return self.dropout

    def build(self) -> "LlmJepa":
        return LlmJepa(self.weight, self.distance, temperature=self.temperature, stop_gradient=self.stop_gradient,
                       regularizers=[regularizer.build() for regularizer in self.regularizers])


def cosine_distance(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - cos of each pair, the distance of the paper: (P, D), (P, D) -> (P,)."""
    return 1 - F.cosine_similarity(prediction, target, dim=-1)


def l2_distance(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Euclidean distance of each pair: (P, D), (P, D) -> (P,)."""
    return torch.linalg.vector_norm(prediction - target, dim=-1)


def mse_distance(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the components of each pair: (P, D), (P, D) -> (P,)."""
    return (prediction - target).square().mean(dim=-1)


DISTANCES = {"cosine": cosine_distance, "l2": l2_distance, "mse": mse_distance}


def info_nce_sum(pool: Pool, temperature: float) -> torch.Tensor:
    """Sum over this rank's pairs of -log softmax of its target among all targets of the pool.

    van den Oord et al., arXiv 1807.03748, equation 4, with cosine similarities over `temperature`. Targets equal to a
    pair's own, targets of the same record, and those of the other direction are not its negatives.
    """
    similarity = F.normalize(pool.prediction, dim=-1) @ F.normalize(pool.target, dim=-1).T / temperature
    own_target = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    logits = similarity.masked_fill(~(pool.strangers() | own_target), float("-inf"))
    losses = (logits.logsumexp(dim=1) - logits.diagonal()) * pool.valid
    return own_share(losses.sum(), losses[pool.own].sum())


class LlmJepa(AuxiliaryObjective):
    """The language-model loss and `weight` times the distance of the pairs."""

    def __init__(self, weight: float, distance: str, *, temperature: float | None = None, stop_gradient: bool = False,
                 regularizers: list[Regularizer] = ()):
        super().__init__(weight, "pairs", list(regularizers))
        self.distance, self.stop_gradient = distance, stop_gradient
        self.pooled = distance == "info_nce"
        self.temperature = DEFAULT_TEMPERATURE if temperature is None else temperature

    def auxiliary_sum(self, hidden: torch.Tensor, prediction: torch.Tensor, target: torch.Tensor, batch: Batch, pool: Pool | None) -> torch.Tensor:
        if self.distance == "info_nce":
            return info_nce_sum(pool.with_fixed_targets() if self.stop_gradient else pool, self.temperature)
        distances = DISTANCES[self.distance](prediction, target.detach() if self.stop_gradient else target)
        return torch.where(batch.pair_valid, distances, 0.0).sum()
