"""Monitors of how well embeddings distinguish pairs. They reveal a collapse that looks like success in a loss curve."""

import torch
import torch.nn.functional as F

from pretrain.objectives.pool import Pool

RANK_PAIRS = 1024
"""Maximum number of pairs for the effective rank, because its cost grows with the cube of this number."""


def embedding_monitors(pool: Pool) -> dict[str, float]:
    """Return diagnostics of the pairs of a pool, keyed like the metric tags.

    paired_cosine: mean cosine of a prediction and its own target. shuffled_cosine: mean cosine of a prediction and its
    negatives, the targets of other records with a different text and the same direction. retrieval_at_1: fraction of
    predictions that are nearer to their own target than to any negative. effective_rank: the smaller of the effective
    ranks of predictions and targets, computed from the first RANK_PAIRS pairs. The result is empty if there are fewer
    than two pairs or if an embedding is not finite.
    """
    prediction, target = pool.prediction[pool.valid], pool.target[pool.valid]
    if len(prediction) < 2 or not (prediction.isfinite().all() and target.isfinite().all()):
        return {}
    similarity = F.normalize(prediction, dim=-1) @ F.normalize(target, dim=-1).T
    negatives_mask = pool.negatives_mask()[pool.valid][:, pool.valid]
    paired = similarity.diagonal()
    nearest_negative = similarity.masked_fill(~negatives_mask, float("-inf")).amax(dim=1)
    monitors = {
        "paired_cosine": paired.mean(),
        "effective_rank": torch.minimum(effective_rank(prediction[:RANK_PAIRS]), effective_rank(target[:RANK_PAIRS])),
        # fp64, because the fp32 value of a rate such as 0.9 is not the Python float 0.9
        "retrieval_at_1": (paired > nearest_negative).double().mean(),
    }
    if negatives_mask.any():
        monitors["shuffled_cosine"] = similarity[negatives_mask].mean()
    return {name: value.item() for name, value in monitors.items()}


def effective_rank(embeddings: torch.Tensor) -> torch.Tensor:
    """Return the effective rank of embeddings, (N, D) -> scalar between 1 and min(N, D).

    It is the exponential of the entropy of the normalised singular values of the centred embeddings (Roy and Vetterli,
    "The effective rank", EUSIPCO 2007). The singular values are the square roots of the eigenvalues of the smaller Gram
    matrix in fp64. On a GPU this is much faster than a singular value decomposition.
    """
    centred = embeddings.double()
    centred = centred - centred.mean(dim=0)
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    entropy: torch.Tensor = torch.special.entr(share).sum()
    return entropy.exp()
