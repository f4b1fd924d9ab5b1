"""The configuration of LLM-JEPA."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data_prep.layout import MAX_PREDICTOR_TOKENS, Pairing
from pretrain.objectives.configs.auxiliary import AuxiliaryConfig, Points, check_points, interpolate

IN_CONTEXT_NEEDS = {
    "layout": "because a view has a context only in a text with the other views",
    "direction": "because a view is read before the views that follow it in the text",
    "predictor_placement": "because prepended predictor tokens need a copy of the context",
}
"""Reasons why a target in context needs the value of a key."""
DROPOUT_LEVELS = 64
"""Number of levels of a scheduled dropout between 0 and 1. The rows are planned anew for each."""


class Config(AuxiliaryConfig):
    """Next-token loss plus `weight` times the distance between predicted and actual embeddings of the other view."""

    name: Literal["llm_jepa"]
    """LLM-JEPA (arXiv 2509.14252)."""
    predictor_tokens: int = Field(default=1, ge=0, le=MAX_PREDICTOR_TOKENS)
    """Number of predictor tokens per context (k). With 0 the prediction is read from the last token of the context."""
    predictor_placement: Literal["append", "prepend"] = "append"
    """append: predictor tokens after the context. prepend: predictor tokens in front of a copy of the context. The copy
    takes up as many positions as the context."""
    predictor_mlp: int = Field(default=0, ge=0, strict=True)
    """Hidden width of an MLP that turns the hidden state of the last predictor token (or of the last token of the
    context) into the prediction, as in JEPA for vision. 0 (published form): no MLP."""
    direction: Literal["forward", "backward", "both"] = "forward"
    """forward: each view predicts the next one (the description predicts the regex). backward: each view predicts the
    previous one. both: each view predicts both the next one and the previous one."""
    target: Literal["alone", "in_context"] = "alone"
    """alone (published form): the target is encoded separately, in a copy. in_context: its embedding is read at its end
    in the text that the language model reads, after the context, so no copy is needed. This works only with layout
    joint, direction forward and appended predictor tokens."""
    distance: Literal["cosine", "l2", "mse", "info_nce"] = "cosine"
    """cosine: the paper's 1 - cos. l2: the Euclidean distance. mse: the mean squared difference of the components.
    info_nce: a contrastive loss; the negatives of a pair are the different targets of other records in the micro step,
    over all ranks."""
    temperature: float | None = Field(default=None, gt=0)
    """Temperature of info_nce. Default: 0.07."""
    stop_gradient: bool = False
    """Whether to stop the gradient into the target embedding. The published form does not stop it."""
    dropout: float | Points = 0.0
    """Loss dropout: the fraction of records that are excluded from the pair terms in an epoch. Points (consumed
    fraction of the budget, dropout) are a schedule with linear interpolation, in steps of 1/64."""

    @field_validator("dropout", mode="before")
    @classmethod
    def _check_form(cls, dropout: Any) -> Any:
        points = dropout if isinstance(dropout, list) else []
        if not all(isinstance(point, list | tuple) and len(point) == 2 for point in points):
            raise ValueError("must be a fraction, or points (fraction of the budget, dropout): [[0, 0], [0.5, 0.75]]")
        return dropout

    @field_validator("dropout")
    @classmethod
    def _check_dropout(cls, dropout: float | Points) -> float | Points:
        if isinstance(dropout, list):
            check_points(dropout, "dropout")
        if any(not 0 <= value < 1 for value in _dropouts(dropout)):
            raise ValueError("must be at least 0 and less than 1")
        return dropout

    @model_validator(mode="after")
    def _check_effective(self) -> "Config":
        if self.temperature is not None and self.distance != "info_nce":
            raise ValueError("temperature has an effect only with distance info_nce; remove it")
        if self.predictor_placement == "prepend" and not self.predictor_tokens:
            raise ValueError("predictor_placement has no effect because predictor_tokens is 0; remove it")
        if self.target == "in_context":
            for key, value, needed in (
                ("layout", self.layout, "joint"),
                ("direction", self.direction, "forward"),
                ("predictor_placement", self.predictor_placement, "append"),
            ):
                if value != needed:
                    raise ValueError(f"target: in_context works only with {key}: {needed}, {IN_CONTEXT_NEEDS[key]}")
        if self.direction != "forward" and self._is_symmetric and not (self.direction == "both" and self.regularizers):
            raise ValueError(
                "direction has an effect only with predictor tokens, predictor_mlp, info_nce or stop_gradient, "
                "because otherwise the auxiliary term is symmetric; remove it"
            )
        return self

    @property
    def _is_symmetric(self) -> bool:
        """Whether exchanging prediction and target leaves the auxiliary term unchanged."""
        has_predictor = self.predictor_tokens > 0 or self.predictor_mlp > 0
        return not has_predictor and self.distance != "info_nce" and not self.stop_gradient

    @property
    def has_negatives(self) -> bool:
        """Whether the term on pairs compares a prediction with other targets too."""
        return self.distance == "info_nce"

    @property
    def pairing(self) -> Pairing:
        """Pairing of the views with the configured predictor tokens."""
        return Pairing(
            self.predictor_tokens, self.predictor_placement, self.direction, in_context=self.target == "in_context"
        )

    @property
    def changes_during_run(self) -> bool:
        """Whether weights or the dropout depend on the consumed fraction of the budget."""
        return super().changes_during_run or isinstance(self.dropout, list)

    def loss_dropout(self, fraction: float) -> float:
        """Return the fraction of the records that loss dropout excludes."""
        if isinstance(self.dropout, float):
            return self.dropout
        rounded = round(DROPOUT_LEVELS * interpolate(self.dropout, fraction)) / DROPOUT_LEVELS
        return min(rounded, max(_dropouts(self.dropout)))  # below 1, so never switched off by rounding


def _dropouts(dropout: float | Points) -> list[float]:
    return [dropout] if isinstance(dropout, float) else [value for _, value in dropout]
