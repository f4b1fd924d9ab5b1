"""The cross-entropy in chunks is that of all logits at once, and keeps no more of them than it says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretrain.models.head import Head

WIDTH, VOCABULARY, LABELS = 16, 50, 37


def linear(bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY, bias=bias)


def full_cross_entropy(layer: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = hidden @ layer.weight.T + (0 if layer.bias is None else layer.bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("labels_at_once", [1, 7, 36, 37, 1000])
def test_chunks_give_the_value_and_the_gradients_of_all_logits_at_once(labels_at_once, softcap, bias):
    layer, labels = linear(bias), torch.randint(VOCABULARY, (LABELS,))
    hidden = torch.randn(LABELS, WIDTH, requires_grad=True)
    leaves = [hidden, *layer.parameters()]
    expected = full_cross_entropy(layer, hidden, labels, softcap)
    value = Head(layer, softcap, most_logits=labels_at_once * VOCABULARY)(hidden, labels)
    torch.testing.assert_close(value, expected)
    for one, other in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_no_tensor_holds_more_logits_than_stated():
    """Neither in the forward nor in the backward pass: every tensor that an operation makes is looked at."""
    layer, labels, hidden = linear(), torch.randint(VOCABULARY, (LABELS,)), torch.randn(LABELS, WIDTH, requires_grad=True)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            out = function(*arguments, **(keywords or {}))
            sizes.extend(tensor.numel() for tensor in (out if isinstance(out, tuple | list) else [out]) if isinstance(tensor, torch.Tensor))
            return out

    def largest(most_logits: int) -> int:
        sizes.clear()
        with Watch():
            Head(layer, None, most_logits)(hidden, labels).backward()
        return max(sizes)

    weight = WIDTH * VOCABULARY  # of the gradient
    assert largest(10**6) == LABELS * VOCABULARY > weight
    assert largest(5 * VOCABULARY) == weight > 5 * VOCABULARY


def test_the_forward_pass_keeps_no_logits_of_its_chunks():
    layer, labels, hidden = linear(), torch.randint(VOCABULARY, (LABELS,)), torch.randn(LABELS, WIDTH, requires_grad=True)

    def kept(most_logits: int) -> int:
        tensors: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            tensors[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            Head(layer, None, most_logits)(hidden, labels)
        return sum(tensors.values())

    assert kept(10**6) > LABELS * VOCABULARY > kept(5 * VOCABULARY)


def test_without_a_label_the_loss_is_0_and_the_weight_has_a_gradient():
    layer = linear()
    Head(layer, None)(torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64)).backward()
    assert layer.weight.grad is not None and not layer.weight.grad.any()


def test_as_a_layer_it_is_the_linear_one():
    layer = linear()
    hidden = torch.randn(2, 3, WIDTH)
    assert torch.equal(Head(layer, 3.0)(hidden), layer(hidden))
