"""The interface of objectives, their construction from a configuration, and the normalisation of the loss."""

import importlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch

from pretrain.data.batch import Batch
from pretrain.data.loader import Unit
from pretrain.objectives.configs import ObjectiveConfig
from pretrain.objectives.pool import Gather, Pool

CrossEntropy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Function from hidden states (M, D) and next-token ids (M,) to the scalar sum of cross-entropies in nats."""


class ObjectiveOutput(NamedTuple):
    """The result of one forward pass."""

    terms: dict[str, torch.Tensor]
    """This rank's sum of each term over the micro batch, fp32 scalars."""
    pool: Pool | None
    """The pairs of all ranks; None if they were not gathered."""


class Objective(Protocol):
    """A weighted sum of terms."""

    weights: Mapping[str, float]
    """The weight of each term in the loss."""
    units: Mapping[str, Unit]
    """Unit over which each term is summed, as the function that counts it: `count_targets`, `count_pairs`,
    `count_spans` or `count_ends` of pretrain/data/loader.py, or a function of the objective's own."""

    def __call__(
        self,
        hidden: torch.Tensor,
        batch: Batch,
        cross_entropy: CrossEntropy,
        gather: Gather,
        *,
        with_pool: bool = False,
    ) -> ObjectiveOutput:
        """Return the terms of a micro batch, computed from its hidden states (B * L, D).

        With `with_pool`, the pairs are gathered even if no term needs them.
        """


def build_objective(config: ObjectiveConfig) -> Objective:
    """Return the objective of a configuration by calling `from_config` of the module `pretrain.objectives.NAME`."""
    objective: Objective = importlib.import_module(f"pretrain.objectives.{config.name}").from_config(config)
    return objective


def total_loss(
    terms: Mapping[str, torch.Tensor], counts: Mapping[str, int], weights: Mapping[str, float], ranks: int
) -> torch.Tensor:
    """Return the loss to differentiate on one rank: the sum over terms of ranks * weight * sum / count.

    `counts` has the count of each term over the whole global batch. The factor `ranks` is needed because DeepSpeed
    averages gradients over ranks. The averaged gradient then equals the gradient of the global batch.
    """
    first, *others = [weights[name] / max(1, counts[name]) * value for name, value in terms.items()]
    return ranks * sum(others, start=first)
