"""Checks of single operations for benchmarks/gpu.py: `gpu_kernels.py attention|head|pieces [--small]`.

The last line of the output is a JSON object. `--small` uses sizes that a CPU can handle. It has no
effect on attention, which always needs a GPU.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.flex_attention import flex_attention_forward

from pretrain.models.attention import visibility_mask
from pretrain.models.head import Head
from pretrain.objectives.monitors import embedding_monitors
from pretrain.objectives.pool import Pool
from pretrain.training.host_copies import HostCopies

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """The shape of an attention layer."""

    query_heads: int
    key_heads: int
    head_width: int
    length: int
    softcap: float | None = None
    window: int | None = None


CASES = {
    "llama_1b": Case(32, 8, 64, 4096),
    "llama_3b": Case(24, 8, 128, 1024),
    "gemma2, full": Case(8, 4, 256, 1024, softcap=50.0),
    "gemma2, sliding": Case(8, 4, 256, 1024, softcap=50.0, window=64),
    "rows of 200": Case(6, 6, 24, 200),
    "rows of 96": Case(4, 2, 16, 96),
}


def main() -> None:
    """Run a check and print its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(json.dumps(CHECKS[arguments.check](arguments.small)), flush=True)


def mean_seconds(call: Callable[[], object], times: int = 3) -> float:
    """Call once to warm up, then return the mean duration of `times` further calls in seconds."""
    call()
    _wait()
    started = time.perf_counter()
    for _ in range(times):
        call()
    _wait()
    return (time.perf_counter() - started) / times


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference divided by the norm of the expected tensor."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def attention(small: bool) -> dict[str, Any]:
    """Compare FlexAttention in bf16, forward and backward, with attention over a dense mask in fp32."""
    results: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        torch._dynamo.reset()
        try:
            results[name] = _attention_case(case)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(name, results[name], flush=True)
    return results


def _attention_case(case: Case) -> dict[str, float]:
    visible_until, positions = _packed_rows(2, case.length)
    mask_options: dict[str, Any] = {"positions": positions, "window": case.window} if case.window else {}
    inputs = [
        torch.randn(2, heads, case.length, case.head_width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for heads in (case.query_heads, case.key_heads, case.key_heads)
    ]

    def flex() -> list[torch.Tensor]:
        mask = visibility_mask(visible_until, "flex_attention", **mask_options)
        query, key, value = inputs
        output, _ = flex_attention_forward(
            nn.Identity(), query, key, value, mask, scaling=case.head_width**-0.5, softcap=case.softcap
        )
        output = output.transpose(1, 2)
        return [output, *torch.autograd.grad(output.float().square().sum(), inputs)]

    started = time.perf_counter()
    outputs = flex()
    _wait()
    compiling = time.perf_counter() - started
    fp32_inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    query, key, value = fp32_inputs
    repeats = case.query_heads // case.key_heads
    scores = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) * case.head_width**-0.5
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    visible = visibility_mask(visible_until, "sdpa", **mask_options)
    assert isinstance(visible, torch.Tensor)
    scores = scores.masked_fill(~visible, float("-inf"))
    output = scores.softmax(dim=-1) @ value.repeat_interleave(repeats, 1)
    expected = [output, *torch.autograd.grad(output.square().sum(), fp32_inputs)]
    errors = [relative_error(actual, exact) for actual, exact in zip(outputs, expected, strict=True)]
    mask_seconds = mean_seconds(lambda: visibility_mask(visible_until, "flex_attention", **mask_options))
    return {
        "error_of_output": errors[0],
        "error_of_gradients": max(errors[1:]),
        "compile_seconds": compiling,
        "milliseconds": 1e3 * mean_seconds(flex),
        "mask_milliseconds": 1e3 * mask_seconds,
    }


def _packed_rows(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return visible_until and positions, both (rows, length), for rows packed with texts of about 60 tokens.

    A token sees only its own text.
    """
    is_start = torch.rand(rows, length) < 1 / 60
    is_start[:, 0] = True
    index = torch.arange(length).expand(rows, length)
    start = torch.where(is_start, index, 0).cummax(dim=1).values
    start_or_length = torch.where(is_start, index, length)
    next_start_or_length = torch.cat([start_or_length[:, 1:], torch.full((rows, 1), length)], dim=1)
    end = next_start_or_length.flip(1).cummin(dim=1).values.flip(1)
    return end.to(DEVICE), (index - start).to(DEVICE)


def head(small: bool) -> dict[str, Any]:
    """Time the cross-entropy of the output head for several chunk sizes, and measure the error of the gradient.

    The chunk size is the maximum number of logits that are computed at a time. The reference gradient is computed in
    fp32.
    """
    if small:
        width, vocabulary, label_count = 64, 1000, 512
        log2_chunk_sizes = [14, 16, 18]
    else:
        width, vocabulary, label_count = 2048, 128_256, 16_384
        log2_chunk_sizes = [26, 27, 28, 29, 30]
    weight = 0.02 * torch.randn(vocabulary, width, device=DEVICE)
    hidden = torch.randn(label_count, width, device=DEVICE)
    label_ids = torch.randint(vocabulary, (label_count,), device=DEVICE)

    def measure_gradient(dtype: torch.dtype, max_logits: int) -> tuple[torch.Tensor, float, float]:
        """Return the weight gradient, the seconds of a call and its peak memory in bytes."""
        linear = nn.Linear(width, vocabulary, bias=False, device=DEVICE, dtype=dtype)
        linear.weight.data.copy_(weight)
        layer, inputs = Head(linear, None, max_logits), hidden.to(dtype).requires_grad_()

        def call() -> None:
            linear.weight.grad = None
            (layer(inputs, label_ids) / label_count).backward()

        call()
        before = _reset_peak()
        seconds = mean_seconds(call)
        assert linear.weight.grad is not None
        return linear.weight.grad, seconds, _peak() - before

    exact, _, _ = measure_gradient(torch.float32, 2 ** log2_chunk_sizes[-2])
    results = {}
    for power in log2_chunk_sizes:
        weight_gradient, seconds, peak = measure_gradient(torch.bfloat16, 2**power)
        results[f"2^{power}"] = {
            "milliseconds": 1e3 * seconds,
            "teraflops": 6 * label_count * width * vocabulary / seconds / 1e12,
            "error_of_weight_gradient": relative_error(weight_gradient, exact),
            "peak_gib": peak / 2**30,
        }
        print(power, results[f"2^{power}"], flush=True)
    return results


def step_parts(small: bool) -> dict[str, Any]:
    """Time the optimizer step, copies to the host and the monitors, and check that a copy survives a change."""
    parameter_count, width = (10**5, 64) if small else (10**9, 2048)
    pair_counts = [64] if small else [728, 4096]
    results: dict[str, Any] = {}
    for name in ("foreach", "fused"):
        weights = torch.zeros(parameter_count, device=DEVICE, requires_grad=True)
        weights.grad = torch.randn_like(weights)
        optimizer = torch.optim.AdamW([weights], lr=1e-3, foreach=name == "foreach", fused=name == "fused")
        results[f"adamw_{name}_milliseconds"] = 1e3 * mean_seconds(optimizer.step)
        del weights, optimizer
    state = torch.randn(parameter_count, device=DEVICE)
    copies = HostCopies(DEVICE)

    def copy_state() -> None:
        copies.begin()
        copies.copy(state)
        copies.wait()

    copies.begin()
    host_copy = copies.copy(state)
    expected = state.cpu().clone()
    copies.before_change()
    state.zero_()
    copies.wait()
    results["copies_are_unchanged"] = torch.equal(host_copy, expected)
    results["checkpoint_copy_gb_per_second"] = 4 * parameter_count / mean_seconds(copy_state) / 1e9
    results["plain_copy_gb_per_second"] = (
        4 * parameter_count / mean_seconds(lambda: state.to("cpu", copy=True), 1) / 1e9
    )
    for count in pair_counts:
        key = torch.arange(count, device=DEVICE)
        prediction, target = torch.randn(2, count, width, device=DEVICE)
        pool = Pool(prediction, target, key, key, torch.zeros_like(key), key >= 0, slice(0, 0))
        results[f"monitors_of_{count}_pairs_seconds"] = mean_seconds(partial(embedding_monitors, pool), 1)
    return results


def _reset_peak() -> float:
    if DEVICE.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    return float(torch.cuda.memory_allocated())


def _peak() -> float:
    return float(torch.cuda.max_memory_allocated()) if DEVICE.type == "cuda" else 0.0


CHECKS = {"attention": attention, "head": head, "pieces": step_parts}

if __name__ == "__main__":
    main()
