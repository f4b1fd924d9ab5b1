"""The configuration of next implicit token prediction."""

from typing import Literal

from pydantic import Field

from data_prep.layout import Pairing
from pretrain.objectives.configs.auxiliary import AuxiliaryConfig


class Config(AuxiliaryConfig):
    """Next-token loss plus `weight` times the distance to a shallow state of the next token, on plain text and pairs.

    The distance is 1 - cos between a projection of the last hidden state and the hidden state of the next token after
    a shallow layer. The published weight is 1.
    """

    name: Literal["nitp"]
    """Next implicit token prediction (arXiv 2605.24956)."""
    layer: int | None = Field(default=None, ge=1)
    """Number of the layer whose output is the target; the first layer is 1. Default: the layer at 20% of the depth."""

    @property
    def pairing(self) -> Pairing | None:
        """Pairing of the views; None without regularizers."""
        return self.pairing_of_regularizers
