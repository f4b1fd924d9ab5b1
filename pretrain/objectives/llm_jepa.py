"""LLM-JEPA: next-token loss plus a distance between the predicted and the actual embedding of the other view.

Huang, LeCun and Balestriero, arXiv 2509.14252, equation 2: L = L_LM + lambda * d(Pred(Enc(context)), Enc(target)).
In the published form, gradients flow into both prediction and target, and Pred is the model itself with predictor
tokens. There is no moving average. A predictor MLP after the model, as in JEPA for vision, is optional.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from pretrain.data.loader import count_pairs
from pretrain.objectives.auxiliary import AuxiliaryObjective
from pretrain.objectives.base import ForwardPass, ModelShape, Term
from pretrain.objectives.configs.llm_jepa import Config
from pretrain.objectives.mlp import Mlp
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
        predictor: Mlp | None = None,
        regularizers: Sequence[Regularizer] = (),
    ):
        super().__init__({"jepa": Term(weight, count_pairs)}, regularizers)
        self.distance, self.stop_gradient, self.predictor = distance, stop_gradient, predictor
        self.pooled = distance == "info_nce"
        self.temperature = DEFAULT_TEMPERATURE if temperature is None else temperature

    def predict(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the predictions from the embeddings of the contexts, by the predictor MLP if there is one."""
        return embeddings if self.predictor is None else self.predictor(embeddings)

    def auxiliary_sums(
        self, forward_pass: ForwardPass, prediction: torch.Tensor, target: torch.Tensor, pool: Pool | None
    ) -> dict[str, torch.Tensor]:
        """Return this rank's sum of the distances."""
        if self.distance == "info_nce":
            assert pool is not None
            pool = pool.with_detached_targets() if self.stop_gradient else pool
            return {"jepa": info_nce_sum(pool, self.temperature)}
        distances = DISTANCES[self.distance](prediction, target.detach() if self.stop_gradient else target)
        return {"jepa": torch.where(forward_pass.batch.pair_valid, distances, 0.0).sum()}

    def flops(self, counts: Mapping[str, float], head: int) -> float:
        """Return the FLOPs of the predictor MLP; see `Objective`."""
        return 0.0 if self.predictor is None else self.predictor.flops(counts["jepa"])

    def activation_bytes(self, counts: Mapping[str, float], item_bytes: int) -> float:
        """Return the bytes that the predictor MLP stores; see `Objective`."""
        return 0.0 if self.predictor is None else self.predictor.activation_bytes(counts["jepa"], item_bytes)


def from_config(config: Config, shape: ModelShape) -> LlmJepa:
    """Return the objective of a configuration."""
    return LlmJepa(
        config.weight,
        config.distance,
        temperature=config.temperature,
        stop_gradient=config.stop_gradient,
        predictor=Mlp(shape.width, config.predictor_mlp, shape.width) if config.predictor_mlp else None,
        regularizers=build_regularizers(config.regularizers),
    )
