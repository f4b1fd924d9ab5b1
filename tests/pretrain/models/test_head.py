"""The chunked cross-entropy equals the cross-entropy of all logits, and holds no more logits than its limit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretrain.models.head import Head

WIDTH, VOCABULARY, LABELS = 16, 50, 37


def linear(bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY, bias=bias)


def full_cross_entropy(
    layer: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    logits = hidden @ layer.weight.T + (0 if layer.bias is None else layer.bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("labels_at_once", [1, 7, 36, 37, 1000])
def test_chunks_have_the_value_and_gradients_of_all_logits_at_once(labels_at_once, softcap, bias):
    layer, labels = linear(bias), torch.randint(VOCABULARY, (LABELS,))
    hidden = torch.randn(LABELS, WIDTH, requires_grad=True)
    leaves = [hidden, *layer.parameters()]
    expected = full_cross_entropy(layer, hidden, labels, softcap)
    value = Head(layer, softcap, max_logits=labels_at_once * VOCABULARY)(hidden, labels)
    torch.testing.assert_close(value, expected)
    for one, other in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("labels_at_once", [1, 7, 1000])
def test_the_z_loss_has_the_value_and_gradients_of_all_logits_at_once(labels_at_once, softcap, bias):
    layer, labels = linear(bias), torch.randint(VOCABULARY, (LABELS,))
    hidden = (3 * torch.randn(LABELS, WIDTH)).requires_grad_()
    leaves = [hidden, *layer.parameters()]
    logits = hidden @ layer.weight.T + (0 if layer.bias is None else layer.bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_z = logits.exp().sum(1).log()
    loss = full_cross_entropy(layer, hidden, labels, softcap)
    head = Head(layer, softcap, max_logits=labels_at_once * VOCABULARY)
    head.z_loss, head.measures_logits = 0.3, True
    value = head(hidden, labels)
    torch.testing.assert_close(value, loss)
    torch.testing.assert_close(head.sums, torch.stack([(log_z**2).sum(), log_z.sum(), (logits**2).sum()]))
    assert not head.sums.requires_grad
    expected = torch.autograd.grad(loss + 0.3 * (log_z**2).sum(), leaves)
    for one, other in zip(torch.autograd.grad(value, leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_without_training_there_is_no_z_loss():
    layer, labels, hidden = linear(), torch.randint(VOCABULARY, (LABELS,)), torch.randn(LABELS, WIDTH)
    gradients = []
    for z_loss in (0.0, 0.3):
        head = Head(layer, None).eval()
        head.z_loss = z_loss
        leaf = hidden.clone().requires_grad_()
        gradients += torch.autograd.grad(head(leaf, labels), leaf)
        assert head.sums is None
    assert torch.equal(*gradients)


def test_measuring_the_logits_changes_nothing():
    layer, labels = linear(), torch.randint(VOCABULARY, (LABELS,))
    results = []
    for measures in (False, True):
        head = Head(layer, 2.0, max_logits=7 * VOCABULARY)
        head.measures_logits = measures
        hidden = torch.linspace(-1, 1, LABELS * WIDTH).view(LABELS, WIDTH).requires_grad_()
        loss = head(hidden, labels)
        results.append((loss, *torch.autograd.grad(loss, [hidden, layer.weight])))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows_at_once", [1, 14, 74, 1000])
def test_the_divergence_has_the_value_and_gradient_of_all_logits_at_once(rows_at_once, softcap, bias):
    layer = linear(bias)
    hidden, reference = (torch.randn(LABELS, WIDTH, requires_grad=True) for _ in range(2))
    found, expected = (
        (states @ layer.weight.T + (0 if layer.bias is None else layer.bias)) for states in (hidden, reference)
    )
    if softcap is not None:
        found, expected = (softcap * torch.tanh(logits / softcap) for logits in (found, expected))
    full = F.kl_div(found.log_softmax(1), expected.log_softmax(1), reduction="sum", log_target=True)
    value = Head(layer, softcap, max_logits=rows_at_once * VOCABULARY)(hidden, reference=reference)
    torch.testing.assert_close(value, full)
    torch.testing.assert_close(
        torch.autograd.grad(3 * value, hidden)[0], 3 * torch.autograd.grad(full, hidden)[0], rtol=1e-5, atol=1e-6
    )
    again = Head(layer, softcap)(hidden, reference=reference)
    assert torch.autograd.grad(again, [reference, layer.weight], allow_unused=True) == (None, None)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scaled_logits_have_the_values_and_gradients_of_all_logits_at_once(softcap):
    """Cohere and Granite scale all logits, the bias included."""
    layer, labels = linear(bias=True), torch.randint(VOCABULARY, (LABELS,))
    hidden, reference = (torch.randn(LABELS, WIDTH, requires_grad=True) for _ in range(2))
    head = Head(layer, softcap, max_logits=14 * VOCABULARY, scale=0.3)
    found, expected = (0.3 * layer(states) for states in (hidden, reference))
    if softcap is not None:
        found, expected = (softcap * torch.tanh(logits / softcap) for logits in (found, expected))
    torch.testing.assert_close(head.finish(head(hidden)), found)
    value, full = head(hidden, labels), F.cross_entropy(found, labels, reduction="sum")
    divergence = F.kl_div(found.log_softmax(1), expected.log_softmax(1), reduction="sum", log_target=True)
    torch.testing.assert_close(value, full)
    torch.testing.assert_close(head(hidden, reference=reference), divergence)
    leaves = [hidden, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(value, leaves), torch.autograd.grad(full, leaves, retain_graph=True), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(head(hidden, reference=reference), hidden), torch.autograd.grad(divergence, hidden)
    )


@pytest.mark.parametrize("with_reference", [False, True])
def test_no_tensor_exceeds_the_limit_of_logits(with_reference):
    """Check every tensor that an operation of the forward or backward pass creates."""
    layer, labels, hidden = (
        linear(),
        torch.randint(VOCABULARY, (LABELS,)),
        torch.randn(LABELS, WIDTH, requires_grad=True),
    )
    sizes: list[int] = []

    class RecordSizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            out = function(*arguments, **(keywords or {}))
            sizes.extend(
                tensor.numel()
                for tensor in (out if isinstance(out, tuple | list) else [out])
                if isinstance(tensor, torch.Tensor)
            )
            return out

    reference = torch.randn(LABELS, WIDTH) if with_reference else None

    def largest(max_logits: int) -> int:
        sizes.clear()
        with RecordSizes():
            Head(layer, None, max_logits)(hidden, labels, reference).backward()
        return max(sizes)

    weight_gradient = WIDTH * VOCABULARY
    assert largest(10**6) == LABELS * VOCABULARY > weight_gradient
    if with_reference:  # two sets of logits, and no gradient of the weight
        assert largest(30 * VOCABULARY) == WIDTH * VOCABULARY > 15 * VOCABULARY  # the weight itself, transposed
    else:
        assert largest(5 * VOCABULARY) == weight_gradient > 5 * VOCABULARY


def test_the_forward_pass_saves_gradients_and_no_logits():
    layer, labels, hidden = (
        linear(),
        torch.randint(VOCABULARY, (LABELS,)),
        torch.randn(LABELS, WIDTH, requires_grad=True),
    )

    def saved_values(max_logits: int) -> int:
        tensors: dict[int, int] = {}

        def record(tensor: torch.Tensor) -> torch.Tensor:
            tensors[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            Head(layer, None, max_logits)(hidden, labels)
        return sum(tensors.values())

    assert saved_values(10**6) == saved_values(5 * VOCABULARY) == LABELS * WIDTH + VOCABULARY * WIDTH
    with torch.no_grad():
        assert saved_values(10**6) == 0


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_in_bf16_the_sums_over_chunks_are_as_exact_as_one_chunk(softcap):
    """Sums in bf16 would make the loss and the weight gradient less exact with every chunk."""
    torch.manual_seed(0)
    layer, labels = nn.Linear(32, 200, bias=False, dtype=torch.bfloat16), torch.randint(200, (2048,))
    hidden = torch.randn(2048, 32).bfloat16().requires_grad_()
    exact = nn.Linear(32, 200, bias=False, dtype=torch.float64)
    exact.weight.data.copy_(layer.weight.data)
    expected = full_cross_entropy(exact, hidden.detach().double(), labels, softcap)
    expected.backward()

    exact_hidden = torch.autograd.grad(
        full_cross_entropy(exact, precise := hidden.detach().double().requires_grad_(), labels, softcap), precise
    )[0]

    def errors(labels_at_once: int) -> tuple[float, float, float]:
        """Return the errors of the loss, of the weight gradient, and of the scale of the gradient of `hidden`."""
        layer.weight.grad = hidden.grad = None
        loss = Head(layer, softcap, labels_at_once * 200)(hidden, labels)
        (loss / 1234).backward()  # bf16 rounds 1 / 1234 by 0.2%
        weight_error = (1234 * layer.weight.grad.double() - exact.weight.grad).norm() / exact.weight.grad.norm()
        factor = 1234 * (hidden.grad.double() * exact_hidden).sum() / exact_hidden.square().sum()
        return abs(loss.item() / expected.item() - 1), weight_error.item(), abs(factor.item() - 1)

    in_one, in_many = errors(2048), errors(16)
    assert in_many[0] < 1e-4 and in_many[1] < 3e-3, "the errors of linear_cross_entropy in torch are 3e-2 and 9e-3"
    assert in_many[1] < 1.1 * in_one[1] and max(in_one[2], in_many[2]) < 1e-3


def test_the_bias_gradient_is_summed_in_fp32():
    torch.manual_seed(0)
    layer, labels = nn.Linear(8, 4, dtype=torch.bfloat16), torch.randint(4, (4096,))
    hidden = torch.randn(4096, 8).bfloat16()
    Head(layer, None, 4 * 4)(hidden, labels).backward()
    exact = nn.Linear(8, 4, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    full_cross_entropy(exact, hidden.double(), labels, None).backward()
    torch.testing.assert_close(layer.bias.grad.double(), exact.bias.grad, rtol=5e-3, atol=2.0)


def test_large_logits_do_not_overflow():
    layer, labels, hidden = linear(), torch.randint(VOCABULARY, (LABELS,)), 500 * torch.randn(LABELS, WIDTH)
    expected = full_cross_entropy(layer, hidden, labels, None)
    assert (hidden @ layer.weight.T).max() > 200 and expected.isfinite()
    torch.testing.assert_close(Head(layer, None)(hidden, labels), expected)


def test_a_vocabulary_above_the_limit_is_processed_label_by_label():
    layer, labels, hidden = linear(), torch.randint(VOCABULARY, (LABELS,)), torch.randn(LABELS, WIDTH)
    torch.testing.assert_close(
        Head(layer, None, max_logits=VOCABULARY - 1)(hidden, labels), full_cross_entropy(layer, hidden, labels, None)
    )


def test_without_gradients_only_logits_are_computed():
    layer, labels, hidden = (
        linear(),
        torch.randint(VOCABULARY, (LABELS,)),
        torch.randn(LABELS, WIDTH, requires_grad=True),
    )
    products = []

    class RecordProducts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            products.extend([function] if "mm" in str(function) else [])
            return function(*arguments, **(keywords or {}))

    with torch.no_grad(), RecordProducts():
        Head(layer, None)(hidden, labels)
    assert len(products) == 1


def test_a_gradient_can_be_taken_twice():
    """monitor.gradients_every computes the gradient of each term in this way."""
    layer, labels, hidden = (
        linear(),
        torch.randint(VOCABULARY, (LABELS,)),
        torch.randn(LABELS, WIDTH, requires_grad=True),
    )
    loss = Head(layer, None)(hidden, labels)
    first = torch.autograd.grad(loss, [hidden, layer.weight], retain_graph=True)
    second = torch.autograd.grad(3 * loss, [hidden, layer.weight])
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(3 * one, other)


def test_a_frozen_layer_passes_the_gradient_on():
    layer, labels = linear(), torch.randint(VOCABULARY, (LABELS,))
    layer.weight.requires_grad_(False)
    hidden = torch.randn(LABELS, WIDTH, requires_grad=True)
    Head(layer, None)(hidden, labels).backward()
    (expected,) = torch.autograd.grad(full_cross_entropy(layer, hidden, labels, None), hidden)
    assert layer.weight.grad is None
    torch.testing.assert_close(hidden.grad, expected)


def test_without_a_label_the_loss_is_0_and_the_weight_has_a_gradient():
    layer = linear()
    Head(layer, None)(torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64)).backward()
    assert layer.weight.grad is not None and not layer.weight.grad.any()


def test_without_labels_the_head_is_the_linear_layer():
    layer = linear()
    hidden = torch.randn(2, 3, WIDTH)
    assert torch.equal(Head(layer, 3.0)(hidden), layer(hidden))
