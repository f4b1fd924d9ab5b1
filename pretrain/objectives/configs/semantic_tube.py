"""The configuration of Semantic Tube Prediction."""

from typing import Literal

from pretrain.data.layout import Pairing, SpanSampling
from pretrain.objectives.configs.auxiliary import AuxiliaryConfig


class Config(AuxiliaryConfig):
    """Next-token loss plus weight times the bend of the hidden states' path. Published weights are 0.005 to 0.04."""

    name: Literal["semantic_tube"]
    """Semantic Tube Prediction (arXiv 2602.22617)."""
    form: SpanSampling = "three_points"
    """three_points: the paper's, at three random positions. sub_span: the released code's, a random span against what is left of the
    document. views: along the first view, then along the second; layout joint only."""

    @property
    def spans(self) -> SpanSampling:
        """How spans are drawn."""
        return self.form

    @property
    def pairing(self) -> Pairing | None:
        """Which view predicts which; None without regularizers."""
        return Pairing() if self.regularizers else None  # they look at pairs; the term does not
