"""The interface of objectives, their construction from a configuration, and the one place that normalises."""

import importlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch

from pretrain.data.batch import Batch
from pretrain.objectives.configs import ObjectiveConfig
from pretrain.objectives.pool import Gather, Pool

CrossEntropy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Hidden states (M, D) and the ids of the next tokens (M,) -> the sum of the cross-entropies in nats, a scalar."""


class ObjectiveOutput(NamedTuple):
    """What one forward pass returns."""

    terms: dict[str, torch.Tensor]
    """This rank's sum of each term over the micro batch, fp32 scalars."""
    pool: Pool | None
    """The pairs of all ranks, where they were gathered."""


class Objective(Protocol):
    """A sum of weighted terms."""

    weights: Mapping[str, float]
    """The weight of each term in the loss."""
    units: Mapping[str, str]
    """What each term is summed over, and so divided by: `targets`, `pairs` or `spans`."""

    def __call__(
        self,
        hidden: torch.Tensor,
        batch: Batch,
        cross_entropy: CrossEntropy,
        gather: Gather,
        *,
        with_pool: bool = False,
    ) -> ObjectiveOutput:
        """Terms of a micro batch from its hidden states (B * L, D).

        `with_pool` gathers the pairs even where no term needs them.
        """


def build_objective(config: ObjectiveConfig) -> Objective:
    """Return the objective that a configuration describes: call `from_config` of the module `pretrain.objectives.NAME`."""
    objective: Objective = importlib.import_module(f"pretrain.objectives.{config.name}").from_config(config)
    return objective


def total_loss(
    terms: Mapping[str, torch.Tensor], counts: Mapping[str, int], weights: Mapping[str, float], ranks: int
) -> torch.Tensor:
    """The loss to differentiate on one rank: sum over terms of weight * sum / count.

    `counts` are those of the whole global batch, by term. DeepSpeed averages gradients over ranks, hence the factor `ranks`:
    together the gradients are those of one global batch.
    """
    first, *others = [weights[name] / max(1, counts[name]) * value for name, value in terms.items()]
    return ranks * sum(others, start=first)
