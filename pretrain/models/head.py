"""The output head: logits, and the cross-entropy of labelled positions without materialising all logits at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

MAX_LOGITS = {"cpu": 2**26, "cuda": 2**28}
"""Maximum number of logits in memory, by device: 256 MiB in fp32 on CPU; 1 GiB on CUDA, where this is faster."""


class Head(nn.Module):
    """Replacement for the output layer of a causal language model; it keeps the name and the weight of that layer.

    One module call computes the whole cross-entropy, chunk by chunk. Under ZeRO-3 the weight is therefore gathered
    once, and ranks with different numbers of chunks make the same number of gathers.
    """

    def __init__(self, linear: nn.Linear, softcap: float | None, max_logits: int | None = None, scale: float = 1.0):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.softcap, self.max_logits, self.scale = softcap, max_logits, scale
        self.z_loss = 0.0
        """Coefficient of the z-loss in training; see `_CrossEntropy`."""
        self.measures_logits = False
        """Whether `sums` contains the sum of the squared logits."""
        self.sums: torch.Tensor | None = None
        """Sums over the labels of the last cross-entropy, (3,) in fp32, without a gradient: (log Z)^2, log Z, and the
        squares of the logits. None if neither the z-loss nor the logits are measured."""

    def forward(
        self, hidden: torch.Tensor, label_ids: torch.Tensor | None = None, reference: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the raw logits, with labels the sum of the cross-entropies, or with a reference a divergence.

        Without labels, which is how transformers calls it: (..., D) -> (..., V). With labels (M,): (M, D) -> scalar in
        fp32, in nats; in training its gradient includes the z-loss. With `reference` (M, D): the sum of KL(p || q) as
        another scalar, with the next-token distributions p of `reference` and q of `hidden`; the gradient flows into
        `hidden` only.
        """
        max_logits = self.max_logits or MAX_LOGITS[hidden.device.type]
        chunk_size = max(1, max_logits // len(self.weight))
        if label_ids is None and reference is None:
            return F.linear(hidden, self.weight, self.bias)
        bias: torch.Tensor | None = self.bias
        if self.scale != 1:
            hidden, bias = hidden * self.scale, None if bias is None else bias * self.scale
        if reference is not None:
            chunk_size = max(1, chunk_size // 2)  # a chunk has two sets of logits
            reference = reference if self.scale == 1 else reference * self.scale
            divergence: torch.Tensor = _KlDivergence.apply(
                hidden, reference, self.weight, bias, self.softcap, chunk_size, torch.is_grad_enabled()
            )
            return divergence
        loss: torch.Tensor
        loss, self.sums = _CrossEntropy.apply(
            hidden,
            self.weight,
            bias,
            label_ids,
            self.softcap,
            chunk_size,
            torch.is_grad_enabled(),
            self.z_loss if self.training else 0.0,
            self.measures_logits,
        )
        return loss

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits of the model from raw logits: scaled and soft-capped, if the model does this.

        Soft-capping is cap * tanh(logits / cap) (Gemma 2, arXiv 2408.00118, section 2).
        """
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class _CrossEntropy(torch.autograd.Function):
    """Autograd function for the sum of cross-entropies. Its forward pass also computes the gradients, chunk by chunk.

    The loss, the softmax and the sum of the weight's gradient over the chunks are in fp32. torch's
    `linear_cross_entropy` does the same without soft-capping. With bf16 inputs, however, it returns the loss in bf16
    and sums the gradients of the chunks in bf16 (torch 2.13).

    With `z_loss`, the gradient is the one of the loss plus z_loss * (log Z)^2 for each label, with Z the sum of the
    exponentials of the soft-capped logits. The returned loss does not include this term, which is in `sums`. A gradient
    of its own would double the memory and the matrix products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        label_ids: torch.Tensor,
        softcap: float | None,
        chunk_size: int,
        grad_enabled: bool,
        z_loss: float,
        measures_logits: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the loss, a scalar in fp32, computed for `chunk_size` labels at a time, and `Head.sums`.

        Shapes: hidden (M, D), weight (V, D), bias (V,) or None, label_ids (M,).
        """
        needs_hidden, needs_weight, needs_bias = (grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device) if z_loss or measures_logits else None
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            chunk_loss, gradient = _loss_and_gradient(
                F.linear(hidden[chunk], weight, bias),
                label_ids[chunk],
                softcap,
                needs_hidden or needs_weight or needs_bias,
                z_loss,
                measures_logits,
                sums,
            )
            loss += chunk_loss
            if grad_bias is not None:
                grad_bias += gradient.sum(dim=0)
            if grad_weight is not None and not hidden.is_cuda:
                grad_weight.addmm_(gradient.T, hidden[chunk].float())
            gradient = gradient.to(hidden.dtype)
            if grad_weight is not None and hidden.is_cuda:
                # fp32 products are much slower on a GPU, so only the result is in fp32.
                grad_weight += torch.mm(gradient.T, hidden[chunk], out_dtype=torch.float32)
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[chunk])
            del gradient  # frees its memory before the next chunk needs the same amount
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        if sums is not None:
            ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, grad_sums: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the saved gradients times the gradient of the loss.

        The saved gradients are not changed, so backward can run again.
        """
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            *(
                None if gradient is None else (gradient.float() * grad_loss).to(ctx.dtype)
                for gradient in (grad_hidden, grad_weight, grad_bias)
            ),
            *(None,) * 6,
        )


class _KlDivergence(torch.autograd.Function):
    """Autograd function for the sum of KL(softmax(reference logits) || softmax(logits)), chunk by chunk.

    Like `_CrossEntropy`, its forward pass also computes the gradient. Weight, bias and reference are constants.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        reference: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        chunk_size: int,
        grad_enabled: bool,
    ) -> torch.Tensor:
        """Return the divergence, a scalar in fp32; shapes as in `_CrossEntropy`, reference (M, D)."""
        grad_hidden = torch.empty_like(hidden) if grad_enabled and ctx.needs_input_grad[0] else None
        divergence = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            expected = _log_probabilities(F.linear(reference[chunk], weight, bias), softcap)[0]
            found, slope = _log_probabilities(F.linear(hidden[chunk], weight, bias), softcap)
            probabilities = expected.exp()
            divergence += (probabilities * (expected - found)).sum()
            if grad_hidden is not None:
                gradient = found.exp_().sub_(probabilities)
                if slope is not None:
                    gradient *= slope
                torch.mm(gradient.to(hidden.dtype), weight, out=grad_hidden[chunk])
        ctx.save_for_backward(grad_hidden)
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_divergence: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the saved gradient times the gradient of the divergence."""
        (gradient,) = ctx.saved_tensors
        scaled = None if gradient is None else (gradient.float() * grad_divergence).to(gradient.dtype)
        return scaled, None, None, None, None, None, None


def _log_probabilities(logits: torch.Tensor, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the log-softmax in fp32 of soft-capped logits (m, V), and the slope of soft-capping (m, V) or None."""
    scores = logits.float()
    if softcap is None:
        return scores.log_softmax(dim=1), None
    capped = (scores / softcap).tanh_()
    return (capped * softcap).log_softmax(dim=1), capped.square_().neg_().add_(1)


def _loss_and_gradient(
    logits: torch.Tensor,
    label_ids: torch.Tensor,
    softcap: float | None,
    differentiate: bool,
    z_loss: float,
    measures_logits: bool,
    sums: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the cross-entropies of logits (m, V) and its gradient (m, V) in fp32; may overwrite the logits.

    The gradient is with respect to the logits before soft-capping: (softmax - one-hot) * (1 - tanh^2). With `z_loss`,
    softmax is multiplied by 1 + 2 z_loss log Z. If `sums` is not None, the sums of these labels are added to it.
    """
    scores = logits.float()
    slope = None
    if softcap is not None:
        scores = scores.div_(softcap).tanh_()
        slope = scores.square().neg_().add_(1) if differentiate else None
        scores = scores.mul_(softcap)
    label_column = label_ids[:, None]
    if sums is not None and measures_logits:
        sums[2] += torch.linalg.vector_norm(scores).square()
    largest = scores.amax(dim=1, keepdim=True)
    scores -= largest
    picked = scores.gather(1, label_column)
    exponentials = scores.exp_().sum(dim=1, keepdim=True)
    log_exponentials = exponentials.log()
    loss = (log_exponentials - picked).sum()
    if sums is not None:
        log_z = log_exponentials + largest
        sums[:2] += torch.stack([log_z.square().sum(), log_z.sum()])
    if differentiate:
        scores /= exponentials
        if z_loss:
            scores *= 1 + 2 * z_loss * log_z
        scores.scatter_add_(1, label_column, torch.full_like(picked, -1.0))
        if slope is not None:
            scores *= slope
    return loss, scores
