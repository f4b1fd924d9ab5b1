"""The interface of objectives, and the one place that normalises."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol

import torch

from data_prep.config_file import Section
from pretrain.data.batch import Batch
from pretrain.data.layout import Layout, Pairing, SpanForm, Specials, make_layout
from pretrain.objectives.pool import Gather, Pool

CrossEntropy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Hidden states (M, D) and the ids of the next tokens (M,) -> the sum of the cross-entropies in nats, a scalar."""


class Output(NamedTuple):
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

    def __call__(self, hidden: torch.Tensor, batch: Batch, cross_entropy: CrossEntropy, gather: Gather, *, with_pool: bool = False) -> Output:
        """Terms of a micro batch from its hidden states (B * L, D).

        `with_pool` gathers the pairs even where no term needs them.
        """


class ObjectiveConfig(Section):
    """What every objective has."""

    name: str
    layout: Literal["joint", "independent"] = "joint"
    """joint: the target follows the context, as in [BOS context SEP][target EOS]. independent: two documents."""

    @property
    def pairing(self) -> Pairing | None:
        """Which view predicts which; None: there is no term on pairs."""
        return None

    @property
    def spans(self) -> SpanForm | None:
        """How spans are drawn; None: there is no term on spans."""
        return None

    @property
    def record_dropout(self) -> float:
        """Share of the records that take no part in the pair term in an epoch."""
        return 0.0

    def make_layout(self, specials: Specials, views: int, lm_views: str, train_end_token: bool = True, *, validating: bool = False) -> Layout:
        """What a record of `views` views looks like. Validation reads pairs out whatever the objective, for the monitors."""
        pairing = self.pairing
        if validating and pairing is None and views > 1:
            pairing = Pairing()
        return make_layout(self.layout, specials, views=views, pairing=pairing, spans=self.spans, lm_views=lm_views, train_end_token=train_end_token)

    def factor(self, fraction: float) -> float:
        """What the weights of all terms but the language model's are multiplied by, at a consumed fraction of the budget."""
        return 1.0

    @abstractmethod
    def build(self) -> Objective:
        """The objective."""


def total_loss(terms: Mapping[str, torch.Tensor], counts: Mapping[str, int], weights: Mapping[str, float], ranks: int) -> torch.Tensor:
    """The loss to differentiate on one rank: sum over terms of weight * sum / count.

    `counts` are those of the whole global batch, by term. DeepSpeed averages gradients over ranks, hence the factor `ranks`:
    together the gradients are those of one global batch.
    """
    return ranks * sum(weights[name] / max(1, counts[name]) * value for name, value in terms.items())
