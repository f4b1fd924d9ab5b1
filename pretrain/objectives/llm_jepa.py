"""LLM-JEPA: next-token loss plus a distance between the predicted and the actual embedding of the other view.

Huang, LeCun and Balestriero, arXiv 2509.14252, equation 2: L = L_LM + lambda * d(Pred(Enc(context)), Enc(target)).
Gradients flow into both sides; there is no projector and no moving average.
"""

import torch
import torch.nn.functional as F

from pretrain.data.batch import Batch
from pretrain.objectives.base import Head, Output
from pretrain.objectives.next_token import next_token_sum
from pretrain.objectives.pool import Gather, Pool, gather_pool, read_out

DEFAULT_TEMPERATURE = 0.07


def cosine_sum(prediction: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sum over valid pairs of 1 - cos: (P, D), (P, D), (P,) -> scalar. The distance of the paper."""
    return ((1 - F.cosine_similarity(prediction, target, dim=-1)) * valid).sum()


def info_nce_sum(pool: Pool, temperature: float) -> torch.Tensor:
    """Sum over this rank's pairs of -log softmax of its target among all targets of the pool.

    van den Oord et al., arXiv 1807.03748, equation 4, with cosine similarities over `temperature`. Targets equal to a
    pair's own are not its negatives. The value is this rank's share; the gradient is that of the whole pool's loss
    with respect to this rank's embeddings, which are negatives to the pairs of other ranks too.
    """
    similarity = F.normalize(pool.prediction, dim=-1) @ F.normalize(pool.target, dim=-1).T / temperature
    same_target = pool.key[:, None] == pool.key[None, :]
    own_target = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    excluded = (same_target | ~pool.valid[None, :]) & ~own_target
    logits = similarity.masked_fill(excluded, float("-inf"))
    losses = (logits.logsumexp(dim=1) - logits.diagonal()) * pool.valid
    whole = losses.sum()
    return losses[pool.own].sum().detach() + (whole - whole.detach())


class LlmJepa:
    """The language-model loss and `weight` times the distance of the pairs."""

    def __init__(self, weight: float, distance: str, temperature: float | None = None):
        self.weights = {"lm": 1.0, "jepa": weight}
        self.distance = distance
        self.temperature = DEFAULT_TEMPERATURE if temperature is None else temperature

    def __call__(self, hidden: torch.Tensor, batch: Batch, head: Head, gather: Gather, *, with_pool: bool = False) -> Output:
        prediction, target = read_out(hidden, batch)
        pool = gather_pool(prediction, target, batch, gather) if with_pool or self.distance == "info_nce" else None
        jepa = info_nce_sum(pool, self.temperature) if self.distance == "info_nce" else cosine_sum(prediction, target, batch.pair_valid)
        return Output({"lm": next_token_sum(hidden, batch, head), "jepa": jepa}, pool)
