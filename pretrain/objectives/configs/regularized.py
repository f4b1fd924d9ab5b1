"""The configuration of next-token prediction with regularizers."""

from typing import Literal

from pydantic import model_validator

from pretrain.objectives.configs.auxiliary import RegularizedConfig


class Config(RegularizedConfig):
    """Next-token loss plus regularizers of the hidden states at the ends of views, at no additional token.

    The first views of the records and all other views are regularized separately. A plain document is a first view, and
    so is each record of a long document that was cut into several.
    """

    name: Literal["regularized"]
    """Regularizers without a term on pairs: the ablation of an auxiliary term with regularizers."""

    @model_validator(mode="after")
    def _check_regularizers(self) -> "Config":
        if not self.regularizers:
            raise ValueError("regularizers is empty: add one, or choose next_token")
        return self

    @property
    def ends(self) -> bool:
        """The regularizers need the ends of views."""
        return True
