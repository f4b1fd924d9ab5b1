"""The configuration of next-latent prediction."""

from typing import Literal

from pydantic import Field

from data_prep.layout import Pairing
from pretrain.objectives.configs.auxiliary import AuxiliaryConfig


class Config(AuxiliaryConfig):
    """Next-token loss plus `weight` times the error of a predicted next hidden state, on plain text and on pairs.

    An MLP predicts the state from the current hidden state and the next token. The error is the smooth L1 loss.
    Published weights are 1 to 3.
    """

    name: Literal["nextlat"]
    """Next-latent prediction (arXiv 2511.05963)."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence between the next-token distributions of the actual and of the predicted hidden state.
    Published weights are 0.1 to 1; with 0 there is no such term."""

    @property
    def pairing(self) -> Pairing | None:
        """Pairing of the views; None without regularizers."""
        return self.pairing_of_regularizers
