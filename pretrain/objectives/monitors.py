"""Whether embeddings tell pairs apart. A collapsed term looks like success in its loss curve; here it does not."""

import torch
import torch.nn.functional as F

from pretrain.objectives.pool import Pool

COLLAPSE_MARGIN = 0.1
COLLAPSE_LEVEL = 0.5
NEARLY_EQUAL, HARDLY_ANY = 0.95, 0.1
RANK_PAIRS = 1024
"""Pairs at most that the effective rank is computed from, the first ones: its cost grows with the cube of their number."""


def embedding_monitors(pool: Pool) -> dict[str, float]:
    """Diagnostics of the pairs of a pool, keyed like the metric tags; empty for fewer than two pairs or embeddings that are not finite.

    paired_cosine: mean cosine of a prediction with its own target. shuffled_cosine: with those of strangers: other records, other
    texts, the same direction. retrieval_at_1: share of predictions that are nearer to their own target than to any stranger's.
    effective_rank: of predictions and targets, the smaller; of the first RANK_PAIRS pairs where there are more.
    """
    prediction, target = pool.prediction[pool.valid], pool.target[pool.valid]
    if len(prediction) < 2 or not (prediction.isfinite().all() and target.isfinite().all()):
        return {}
    similarity = F.normalize(prediction, dim=-1) @ F.normalize(target, dim=-1).T
    negatives_mask = pool.negatives_mask()[pool.valid][:, pool.valid]
    paired = similarity.diagonal()
    nearest_stranger = similarity.masked_fill(~negatives_mask, float("-inf")).amax(dim=1)
    monitors = {
        "paired_cosine": paired.mean(),
        "effective_rank": torch.minimum(effective_rank(prediction[:RANK_PAIRS]), effective_rank(target[:RANK_PAIRS])),
        "retrieval_at_1": (paired > nearest_stranger)
        .double()
        .mean(),  # a rate is exact in fp64: fp32 would make 0.9 another number than 0.9
    }
    if negatives_mask.any():
        monitors["shuffled_cosine"] = similarity[negatives_mask].mean()
    return {name: value.item() for name, value in monitors.items()}


def effective_rank(embeddings: torch.Tensor) -> torch.Tensor:
    """Exponential of the entropy of the normalised singular values of the centred embeddings, (N, D) -> scalar.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007. Between 1 and min(N, D). The singular values are the roots of the eigenvalues of the
    smaller Gram matrix, in fp64, which on a GPU takes far less time than a singular value decomposition.
    """
    centred = embeddings.double()
    centred = centred - centred.mean(dim=0)
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    entropy: torch.Tensor = torch.special.entr(share).sum()
    return entropy.exp()


def has_collapsed(monitors: dict[str, float]) -> bool:
    """Whether a low loss says nothing: hardly any prediction finds its target, though pairs are close, or unrelated views as close as pairs."""
    if "shuffled_cosine" not in monitors or monitors["retrieval_at_1"] > HARDLY_ANY:
        return False
    paired, shuffled = monitors["paired_cosine"], monitors["shuffled_cosine"]
    return paired > NEARLY_EQUAL or (shuffled > COLLAPSE_LEVEL and paired - shuffled < COLLAPSE_MARGIN)
