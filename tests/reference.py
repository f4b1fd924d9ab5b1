"""LLM-JEPA the slow, obvious way: every encoding is a forward pass of its own, unpadded, one record at a time.

Independent of the project: token lists are built here from the bare views, the model is the plain Hugging Face one under
its own causal mask, and sums are Python loops. What the packed single forward computes must equal this.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Losses(NamedTuple):
    total: torch.Tensor
    lm: torch.Tensor
    jepa: torch.Tensor


class Ids(NamedTuple):
    bos: int
    eos: int
    sep: int


def hidden_states(causal_lm, tokens: list[int], appended: torch.Tensor | None = None) -> torch.Tensor:
    """Last-layer hidden states (L, D) of one sequence, with embeddings (k, D) appended to those of its tokens."""
    embedded = causal_lm.get_input_embeddings()(torch.tensor(tokens))
    if appended is not None:
        embedded = torch.cat([embedded, appended])
    return causal_lm.model(inputs_embeds=embedded[None], use_cache=False).last_hidden_state[0]


def cross_entropies(causal_lm, tokens: list[int], first_target: int) -> list[torch.Tensor]:
    """-log p of the tokens from `first_target` on, each given those before it."""
    log_p = causal_lm.lm_head(hidden_states(causal_lm, tokens)).log_softmax(dim=-1)
    return [-log_p[place - 1, tokens[place]] for place in range(first_target, len(tokens))]


def lm_cross_entropies(causal_lm, context: list[int], target: list[int], ids: Ids, layout: str, lm_views: str) -> list[torch.Tensor]:
    """The next-token losses of one record: one joint sequence, or a document for each view."""
    if layout == "joint":
        before = [ids.bos, *context, ids.sep]
        return cross_entropies(causal_lm, [*before, *target, ids.eos], 1 if lm_views == "all" else len(before))
    of_target = cross_entropies(causal_lm, [ids.bos, *target, ids.eos], 1)
    return (cross_entropies(causal_lm, [ids.bos, *context, ids.eos], 1) if lm_views == "all" else []) + of_target


def encode_pair(causal_lm, predictor, context: list[int], target: list[int], ids: Ids, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The predicted and the actual embedding of the target, (D,) each. `predictor` (k, D), or None for k = 0."""
    before = [ids.bos, *context, ids.sep if layout == "joint" else ids.eos]
    alone = [*target, ids.eos] if layout == "joint" else [ids.bos, *target, ids.eos]
    return hidden_states(causal_lm, before, predictor)[-1], hidden_states(causal_lm, alone)[-1]


def info_nce(pairs: list[tuple[torch.Tensor, torch.Tensor]], contents: list, temperature: float) -> list[torch.Tensor]:
    """-log softmax of each pair's own target among it and all different ones; `contents` tells targets apart."""
    losses = []
    for i, (prediction, own) in enumerate(pairs):
        own_logit = F.cosine_similarity(prediction, own, dim=0) / temperature
        logits = [own_logit]
        for j, (_, other) in enumerate(pairs):
            if contents[j] != contents[i]:
                logits.append(F.cosine_similarity(prediction, other, dim=0) / temperature)
        losses.append(torch.stack(logits).logsumexp(dim=0) - own_logit)
    return losses


def reference_losses(causal_lm, predictor, records: list[tuple[list[int], list[int]]], ids: Ids, *, layout: str, lm_views: str = "all",
                     distance: str = "cosine", temperature: float = math.nan, weight: float = 1.0, paired: list[bool] | None = None) -> Losses:
    """Both terms of records of (context, target) tokens, and the loss; records that are not `paired` sit out the second term."""
    lm, pairs, contents = [], [], []
    for number, (context, target) in enumerate(records):
        lm += lm_cross_entropies(causal_lm, context, target, ids, layout, lm_views)
        if paired is None or paired[number]:
            pairs.append(encode_pair(causal_lm, predictor, context, target, ids, layout))
            contents.append(target)
    if distance == "cosine":
        distances = [1 - F.cosine_similarity(prediction, target, dim=0) for prediction, target in pairs]
    else:
        distances = info_nce(pairs, contents, temperature)
    lm_mean = sum(lm) / len(lm)
    jepa_mean = sum(distances) / len(distances) if distances else torch.zeros(())
    return Losses(lm_mean + weight * jepa_mean, lm_mean, jepa_mean)
