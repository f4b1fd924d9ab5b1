"""Muon for the hidden matrices of a model and AdamW for its other weights, on the partitions of ZeRO.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest
matrix with orthonormal rows or columns, approximately. DeepSpeed's implementation (0.19.8) computes the norm for the
clipping of gradients after this step, so it would scale the updates down, and its momentum is in no universal
checkpoint. Here, gradients are clipped first, and the momentum has the place of Adam's first moment.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain.models.hidden_matrices import full_shape
from pretrain.planning.flops import ITERATIONS
from pretrain.training.distributed import World

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic polynomial of the Newton-Schulz iteration (Jordan et al.)."""
UPDATE_RMS = 0.2
"""Root mean square of the elements of an update, relative to the learning rate, as is typical for AdamW.

A matrix (m, n) is therefore scaled by 0.2 sqrt(max(m, n)) (Liu et al., arXiv 2502.16982, section 2.2), and Muon can use
the learning rate and the weight decay of AdamW.
"""


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix (m, n) with the same singular vectors and singular values between about 0.7 and 1.2.

    The Newton-Schulz iteration leaves singular values below a thousandth of the Frobenius norm smaller.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    estimate = wide / (wide.norm() + 1e-7)
    first, third, fifth = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = estimate @ estimate.T
        estimate = first * estimate + (third * gram + fifth * gram @ gram) @ estimate
    return estimate if wide is matrix else estimate.T


def update_scale(shape: torch.Size) -> float:
    """Return the factor of an orthogonalised matrix of this shape; see UPDATE_RMS."""
    return UPDATE_RMS * math.sqrt(max(shape))


@dataclass(frozen=True)
class _Matrix:
    """A hidden matrix, whose flat elements are divided among the ranks in the order of the ranks."""

    shape: torch.Size
    place: slice
    """Place of this rank's elements in its flat partition."""
    parts: list[int]
    """Number of elements on each rank."""


class MuonWithAdamW(torch.optim.AdamW):
    """Optimizer that updates the parameter groups with `muon=True` by Muon, and all other groups by AdamW.

    DeepSpeed replaces the parameters of a group by flat partitions. `bind` finds the matrices in them. Before that, a
    step only creates the state, as DeepSpeed expects it.

    The state of a flat partition is the momentum, `exp_avg`, and the number of steps. `state_dict` adds zeros as
    `exp_avg_sq`, without memory, because DeepSpeed's conversion to a different number of ranks expects Adam's state.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float, **options: Any):
        super().__init__(groups, **options)
        self._momentum = momentum
        self._matrices: dict[torch.Tensor, list[_Matrix]] = {}
        self._world: World | None = None

    def bind(self, zero: Any, matrices: Sequence[nn.Parameter], world: World) -> None:
        """Find the matrices in the flat partitions of DeepSpeed's optimizer `zero`. All ranks must call this together.

        `matrices` must be in the order of the parameter groups.
        """
        places = [_place(zero, matrix, world.rank) for matrix in matrices]
        counts = zip(*world.gather_objects([place.stop - place.start for place in places]), strict=True)
        flats = _flat_partitions(zero, matrices)
        for matrix, flat, place, parts in zip(matrices, flats, places, counts, strict=True):
            found = _Matrix(full_shape(matrix), place, list(parts))
            assert sum(parts) == found.shape.numel(), f"the ranks have {sum(parts)} elements of {found.shape}"
            self._matrices.setdefault(flat, []).append(found)
        self._world = world

    @property
    def size(self) -> int:
        """Number of elements of all matrices."""
        return sum(matrix.shape.numel() for matrices in self._matrices.values() for matrix in matrices)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters of all groups from their gradients."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step(closure)
        self.param_groups = groups
        for group in groups:
            if group["muon"]:
                for flat in group["params"]:
                    self._update(flat, group["lr"], group["weight_decay"])

    def _update(self, flat: torch.Tensor, rate: float, weight_decay: float) -> None:
        """Update a flat partition (N,)."""
        state = self.state[flat]
        if "exp_avg" not in state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(flat)}
        state["step"] += 1
        if self._world is None or flat.grad is None:
            return
        momentum = state["exp_avg"].lerp_(flat.grad, 1 - self._momentum)
        flat.mul_(1 - rate * weight_decay)
        all_matrices = self._matrices[flat]
        for first in range(0, len(all_matrices), self._world.size):
            matrices = all_matrices[first : first + self._world.size]
            places = [matrix.place for matrix in matrices]
            directions = [flat.grad[place].lerp(momentum[place], self._momentum) for place in places]  # Nesterov
            updates = _orthogonalized(matrices, directions, self._world)
            for matrix, update in zip(matrices, updates, strict=True):
                flat[matrix.place].add_(update.to(flat), alpha=-rate * update_scale(matrix.shape))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with zeros as the second moment of the matrices."""
        saved = super().state_dict()
        for key, state in saved["state"].items():
            if "exp_avg_sq" not in state:
                zeros = torch.zeros(1, device=state["exp_avg"].device).expand_as(state["exp_avg"])
                saved["state"][key] = state | {"exp_avg_sq": zeros}
        return saved

    def drop_placeholders(self) -> None:
        """Remove the zeros that a loaded checkpoint has as the second moment of the matrices."""
        for flat in self._matrices:
            self.state[flat].pop("exp_avg_sq", None)


def _orthogonalized(matrices: Sequence[_Matrix], parts: list[torch.Tensor], world: World) -> Iterator[torch.Tensor]:
    """Return this rank's parts of the orthogonalised matrices, from its `parts` of at most one matrix for each rank.

    Rank i receives the i-th matrix completely, orthogonalises it, and sends every rank its part. All ranks must call
    this together.
    """
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    sizes = [part.numel() for part in parts] + [0] * (world.size - len(parts))
    own = matrices[world.rank] if world.rank < len(matrices) else None
    own_sizes = own.parts if own is not None else [0] * world.size
    sent = torch.cat(parts).to(world.device, dtype)
    whole = sent.new_empty(sum(own_sizes))
    _exchange(whole, sent, own_sizes, sizes, world)
    if own is not None:
        whole = orthogonalize(whole.view(own.shape)).contiguous().view(-1)
    received = torch.empty_like(sent)
    _exchange(received, whole, sizes, own_sizes, world)
    return iter(received.split(sizes[: len(parts)]))


def _exchange(output: torch.Tensor, source: torch.Tensor, received: list[int], sent: list[int], world: World) -> None:
    """Send every rank its part of a flat tensor, and fill `output` with the parts from all ranks."""
    if world.size == 1:
        output.copy_(source)
    else:
        dist.all_to_all_single(output, source, received, sent)


def _place(zero: Any, matrix: Any, rank: int) -> slice:
    """Return the place of this rank's elements of a matrix in the flat partition."""
    if hasattr(matrix, "ds_id"):  # ZeRO stage 3 pads the partition of the last rank
        _, start, size = zero.grad_position[zero.get_param_id(matrix)]
        return slice(start, start + max(0, min(size, matrix.ds_numel - rank * size)))
    if matrix._hp_mapping is None:  # this rank has no part of the matrix
        return slice(0, 0)
    address = matrix._hp_mapping.hp_fragment_address
    return slice(address.start, address.start + address.numel)


def _flat_partitions(zero: Any, matrices: Sequence[Any]) -> list[torch.Tensor]:
    """Return the flat partition of this rank that holds its part of each matrix."""
    if all(hasattr(matrix, "ds_id") for matrix in matrices):
        groups = [zero.grad_position[zero.get_param_id(matrix)][0] for matrix in matrices]
        return [zero.fp32_partitioned_groups_flat[group] for group in groups]
    (flat,) = (group["params"][0] for group in zero.optimizer.param_groups if group["muon"])
    return [flat] * len(matrices)
