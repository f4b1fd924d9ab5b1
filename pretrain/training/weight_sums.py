"""Checksums of the weights that do not depend on how ZeRO partitions them.

They are saved with each checkpoint and compared after it is loaded. DeepSpeed's files contain flat partitions without
the names of the parameters, so a loader that assumes a different order would silently fill the model with permuted
weights.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.utils.console import UserError
from pretrain.training.distributed import World

PERIOD = 4093
"""Number of elements after which the coefficients repeat."""
CHUNK_SIZE = 1 << 20
"""Number of elements that are converted to fp64 together."""
TOLERANCE = 1e-9
"""Largest difference of two equal sums, as a fraction of the sum of the absolute values. It allows only for a different
order of summation."""

Sums = dict[str, list[float]]
"""Four numbers for each parameter: the weighted sums of the elements and of their absolute values, first for the fp32
copy that the optimizer updates, then for the weights that the model computes with."""


def weight_sums(module: nn.Module, world: World) -> Sums:
    """Return the sums over i of c(i) w(i) and c(i) |w(i)| for each parameter w of an engine's module, in fp64.

    i is the index in the flattened parameter. The coefficients c(i) = 1 + i mod PERIOD make a permutation change the
    sum. All ranks must call this together.
    """
    named = list(module.named_parameters())
    local = [
        _sums_of_fragment(*fragment).to(world.device)
        for _, parameter in named
        for fragment in _local_fragments(parameter, world)
    ]
    # number of ranks that hold a copy of the weights that the model computes with
    replicas = [1 if hasattr(parameter, "ds_id") else world.size for _, parameter in named]
    totals = iter(world.sum(list(torch.stack(local).flatten())))
    return {
        name: [next(totals), next(totals), next(totals) / copies, next(totals) / copies]
        for (name, _), copies in zip(named, replicas, strict=True)
    }


def check_weights(
    saved: Sums | None, loaded: Sums, checkpoint: Path, started_anew: Sequence[str] | None = None
) -> None:
    """Raise UserError if the loaded weights differ from the saved ones. Older checkpoints have no sums to compare.

    If `started_anew` lists weights that were not loaded, these and weights that are saved only are ignored.
    """
    if saved is None:
        return
    different = sorted(saved.keys() ^ loaded.keys()) if started_anew is None else []
    different += [
        name
        for name in saved.keys() & loaded.keys() - set(started_anew or ())
        if not _are_close(saved[name], loaded[name])
    ]
    if different:
        raise UserError(
            f"DeepSpeed did not load the weights of {checkpoint} correctly: {different[0]} differs"
            + (f", and {len(different) - 1} more" if len(different) > 1 else "")
            + "; start with the number of ranks and the deepspeed section of the run that wrote it"
        )


def _are_close(one: list[float], other: list[float]) -> bool:
    limits = [TOLERANCE * scale for absolute in (1, 3) for scale in [max(one[absolute], other[absolute])] * 2]
    return all(
        abs(first - second) <= limit or (not math.isfinite(first + second) and str(first) == str(second))
        for first, second, limit in zip(one, other, limits, strict=True)
    )


Fragment = tuple[torch.Tensor, int]
"""A flat part of a parameter, and the index of its first element."""


def _local_fragments(parameter: Any, world: World) -> tuple[Fragment, Fragment]:
    """Return this rank's parts of a parameter: of its fp32 copy, and of the weights that the model computes with.

    A frozen parameter has no fp32 copy. `parameter` is typed Any, because DeepSpeed adds attributes to it.
    """
    empty = torch.empty(0), 0
    if hasattr(parameter, "ds_id"):  # partitioned by ZeRO stage 3; the partition of the last rank may be padded
        start = world.rank * parameter.partition_numel()
        unpadded = slice(0, max(0, parameter.ds_numel - start))
        master = empty
        if parameter.requires_grad:
            master = parameter._z3_optimizer.get_local_fp32_param(parameter)[unpadded], start
        return master, (parameter.ds_tensor.flatten()[unpadded], start)
    mapping = getattr(parameter, "_hp_mapping", None)  # None on a rank without a part of the parameter
    master = (mapping.get_hp_fragment(), mapping.lp_fragment_address.start) if mapping else empty
    return master, (parameter.detach().flatten(), 0)


@lru_cache
def _coefficients(device: torch.device) -> torch.Tensor:
    """Return enough coefficients c(i) for a chunk that starts anywhere within a period."""
    return (1 + torch.arange(CHUNK_SIZE + PERIOD, device=device) % PERIOD).double()


def _sums_of_fragment(flat: torch.Tensor, start: int) -> torch.Tensor:
    """Return the two sums of a fragment (N,) whose first element has index `start`, (2,) in fp64."""
    total = torch.zeros(2, dtype=torch.float64, device=flat.device)
    for begin in range(0, flat.numel(), CHUNK_SIZE):
        part = flat.detach()[begin : begin + CHUNK_SIZE].double()
        first = (start + begin) % PERIOD
        weighted = part * _coefficients(part.device)[first : first + len(part)]
        total += torch.stack([weighted.sum(), weighted.abs().sum()])
    return total
