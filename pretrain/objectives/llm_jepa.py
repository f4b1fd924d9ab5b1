"""LLM-JEPA: next-token loss plus a distance between the predicted and the actual embedding of the other view.

Huang, LeCun and Balestriero, arXiv 2509.14252, equation 2: L = L_LM + lambda * d(Pred(Enc(context)), Enc(target)).
In the published form, gradients flow into both prediction and target. There is no projector and no moving average.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pretrain.data.batch import Batch
from pretrain.data.loader import count_pairs
from pretrain.objectives.auxiliary import AuxiliaryObjective
from pretrain.objectives.configs.llm_jepa import Config
from pretrain.objectives.pool import Pool, local_value_global_grad
from pretrain.objectives.regularizers import Regularizer, build_regularizers

DEFAULT_TEMPERATURE = 0.07


def cosine_distance(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return 1 - cos of each pair, the distance of the paper: (P, D), (P, D) -> (P,)."""
    similarity: torch.Tensor = F.cosine_similarity(prediction, target, dim=-1)
    return 1 - similarity


def l2_distance(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean distance of each pair: (P, D), (P, D) -> (P,)."""
    distance: torch.Tensor = torch.linalg.vector_norm(prediction - target, dim=-1)
    return distance


def mse_distance(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of the components of each pair: (P, D), (P, D) -> (P,)."""
    return (prediction - target).square().mean(dim=-1)


DISTANCES = {"cosine": cosine_distance, "l2": l2_distance, "mse": mse_distance}


def info_nce_sum(pool: Pool, temperature: float) -> torch.Tensor:
    """Return the sum, over this rank's pairs, of -log softmax of the pair's own target relative to its negatives.

    This is equation 4 of van den Oord et al., arXiv 1807.03748, with cosine similarities divided by `temperature`. The
    negatives of a pair exclude targets equal to its own, targets of the same record, and targets of the other
    direction.
    """
    similarity = F.normalize(pool.prediction, dim=-1) @ F.normalize(pool.target, dim=-1).T / temperature
    own_target = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    logits = similarity.masked_fill(~(pool.negatives_mask() | own_target), float("-inf"))
    losses = (logits.logsumexp(dim=1) - logits.diagonal()) * pool.valid
    return local_value_global_grad(losses.sum(), losses[pool.local_slice].sum())


class LlmJepa(AuxiliaryObjective):
    """The language-model loss plus `weight` times the distance between the prediction and the target of each pair."""

    def __init__(
        self,
        weight: float,
        distance: str,
        *,
        temperature: float | None = None,
        stop_gradient: bool = False,
        regularizers: Sequence[Regularizer] = (),
    ):
        super().__init__(weight, count_pairs, regularizers)
        self.distance, self.stop_gradient = distance, stop_gradient
        self.pooled = distance == "info_nce"
        self.temperature = DEFAULT_TEMPERATURE if temperature is None else temperature

    def auxiliary_sum(
        self, hidden: torch.Tensor, prediction: torch.Tensor, target: torch.Tensor, batch: Batch, pool: Pool | None
    ) -> torch.Tensor:
        """Return this rank's sum of the distances."""
        if self.distance == "info_nce":
            assert pool is not None
            return info_nce_sum(pool.with_detached_targets() if self.stop_gradient else pool, self.temperature)
        distances = DISTANCES[self.distance](prediction, target.detach() if self.stop_gradient else target)
        return torch.where(batch.pair_valid, distances, 0.0).sum()


def from_config(config: Config) -> LlmJepa:
    """Return the objective of a configuration."""
    return LlmJepa(
        config.weight,
        config.distance,
        temperature=config.temperature,
        stop_gradient=config.stop_gradient,
        regularizers=build_regularizers(config.regularizers),
    )
