"""The configuration of Semantic Tube Prediction."""

from typing import Literal

from pretrain.data.layout import Pairing, SpanSampling
from pretrain.objectives.configs.auxiliary import AuxiliaryConfig


class Config(AuxiliaryConfig):
    """Next-token loss plus `weight` times the curvature of the path of hidden states.

    Published weights are 0.005 to 0.04.
    """

    name: Literal["semantic_tube"]
    """Semantic Tube Prediction (arXiv 2602.22617)."""
    form: SpanSampling = "three_points"
    """three_points: the form of the paper, between three random positions. sub_span: the form of the released code, a
    random span against the rest of the document. views: the first view against the second; only with layout joint."""

    @property
    def spans(self) -> SpanSampling:
        """Form of the spans."""
        return self.form

    @property
    def pairing(self) -> Pairing | None:
        """Pairing of the views; None without regularizers."""
        return Pairing() if self.regularizers else None  # regularizers need pairs, the term itself does not
