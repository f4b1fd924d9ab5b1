"""The configuration that every objective has."""

from typing import Literal

from data_prep.config_file import Section
from pretrain.data.layout import Layout, Pairing, SpanSampling, SpecialTokenIds, make_layout


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
    def spans(self) -> SpanSampling | None:
        """How spans are drawn; None: there is no term on spans."""
        return None

    @property
    def record_dropout(self) -> float:
        """Share of the records that take no part in the pair term in an epoch."""
        return 0.0

    def make_layout(
        self,
        specials: SpecialTokenIds,
        views: int,
        lm_views: str,
        train_end_token: bool = True,
        *,
        validating: bool = False,
    ) -> Layout:
        """Return what a record of `views` views looks like. Validation reads pairs out whatever the objective, for the monitors."""
        pairing = self.pairing
        if validating and pairing is None and views > 1:
            pairing = Pairing()
        return make_layout(
            self.layout,
            specials,
            views=views,
            pairing=pairing,
            spans=self.spans,
            lm_views=lm_views,
            train_end_token=train_end_token,
        )

    def factor(self, fraction: float) -> float:
        """Return the factor of the weights of all terms but the language model's, at a consumed fraction of the budget."""
        return 1.0
