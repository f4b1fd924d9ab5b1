"""The configuration of Semantic Tube Prediction."""

from typing import Literal

from data_prep.layout import Pairing, SpanSampling
from pretrain.objectives.configs.auxiliary import AuxiliaryConfig


class Config(AuxiliaryConfig):
    """Next-token loss plus `weight` times the curvature of the path of hidden states.

    Published weights are 0.005 to 0.04.
    """

    name: Literal["semantic_tube"]
    """Semantic Tube Prediction (arXiv 2602.22617)."""
    form: SpanSampling = "three_points"
    """Hidden-state steps that should be parallel. three_points (paper): those between three random positions. sub_span
    (released code): a random span and the rest of the document. views (only with layout joint): the first view and the
    second."""

    @property
    def spans(self) -> SpanSampling:
        """Form of the spans."""
        return self.form

    @property
    def pairing(self) -> Pairing | None:
        """Pairing of the views; None without regularizers."""
        return self.pairing_of_regularizers
