"""The configuration of LLM-JEPA."""

from typing import Literal

from pydantic import Field, model_validator

from pretrain.data.layout import Pairing
from pretrain.objectives.configs.auxiliary import AuxiliaryConfig


class Config(AuxiliaryConfig):
    """Next-token loss plus weight times the distance between the predicted and the actual embedding of the other view."""

    name: Literal["llm_jepa"]
    """LLM-JEPA (arXiv 2509.14252)."""
    predictor_tokens: int = Field(default=1, ge=0, le=12)
    """k: predictor tokens at the context; 0 reads the context's own last token."""
    predictor_placement: Literal["append", "prepend"] = "append"
    """append: behind the context. prepend: before a copy of it, which costs the context's tokens a second time."""
    direction: Literal["forward", "backward", "both"] = "forward"
    """forward: each view predicts the next one (the description predicts the regex). backward: the one before it. both: two pairs."""
    distance: Literal["cosine", "l2", "mse", "info_nce"] = "cosine"
    """cosine: the paper's 1 - cos. l2: the Euclidean distance. mse: the mean squared difference of the components. info_nce:
    contrastive, against all targets of the micro step over all ranks."""
    temperature: float | None = Field(default=None, gt=0)
    """Of info_nce; default 0.07."""
    stop_gradient: bool = False
    """Whether the target is held fixed; the published form trains both sides."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Loss dropout: the share of records that sit out the pair terms in an epoch."""

    @model_validator(mode="after")
    def _can_act(self) -> "Config":
        if self.temperature is not None and self.distance != "info_nce":
            raise ValueError("temperature acts on distance info_nce only; leave it out")
        if self.predictor_placement == "prepend" and not self.predictor_tokens:
            raise ValueError("predictor_placement acts on predictor tokens, but predictor_tokens is 0; leave it out")
        if self.direction != "forward" and self._is_symmetric and not (self.direction == "both" and self.regularizers):
            raise ValueError(
                "direction acts with predictor tokens, info_nce or stop_gradient; here the term is the same both ways: leave it out"
            )
        return self

    @property
    def _is_symmetric(self) -> bool:
        """Whether prediction and target could be exchanged."""
        return self.predictor_tokens == 0 and self.distance != "info_nce" and not self.stop_gradient

    @property
    def pairing(self) -> Pairing:
        """Which view predicts which, with the configured predictor tokens."""
        return Pairing(self.predictor_tokens, self.predictor_placement, self.direction)

    @property
    def record_dropout(self) -> float:
        """Fraction of the records that the loss dropout excludes."""
        return self.dropout
