"""The output head: logits, and the cross-entropy of labelled positions without all logits at once."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

MOST_LOGITS = 2**26
"""Logits that exist at a time: 256 MiB in fp32, beside as much for their gradient."""


class Head(nn.Module):
    """The output layer of a causal language model, with its weight and under its name.

    One module call computes the whole cross-entropy, chunk by chunk: under ZeRO-3 the weight is gathered once, and ranks with
    different numbers of chunks stay in step.
    """

    def __init__(self, linear: nn.Linear, softcap: float | None, most_logits: int = MOST_LOGITS):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.softcap, self.most_logits = softcap, most_logits

    def forward(self, hidden: torch.Tensor, label_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits, or with labels the sum of the cross-entropies.

        Without labels, as transformers calls it: (..., D) -> (..., V). With labels (M,): (M, D) -> scalar, in nats.
        """
        if label_ids is None:
            return F.linear(hidden, self.weight, self.bias)
        size = max(1, self.most_logits // len(self.weight))
        if len(hidden) <= size:
            return self._cross_entropy(hidden, label_ids)
        # logits of a chunk are computed again in the backward pass instead of being kept
        return sum(checkpoint(self._cross_entropy, *chunk, use_reentrant=False)
                   for chunk in zip(hidden.split(size), label_ids.split(size), strict=True))

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Gemma 2's soft-capping (arXiv 2408.00118, section 2): cap * tanh(logits / cap)."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _cross_entropy(self, hidden: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        logits = self.capped(F.linear(hidden, self.weight, self.bias))
        return F.cross_entropy(logits.float(), label_ids, reduction="sum")
