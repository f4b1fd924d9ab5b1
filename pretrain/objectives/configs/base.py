"""The base class of the configurations of objectives."""

from dataclasses import replace
from typing import Literal

from data_prep.layout import Layout, Pairing, SpanSampling, SpecialTokenIds, make_layout
from data_prep.utils.config_file import Section


class ObjectiveConfig(Section):
    """The settings that all objectives share."""

    name: str
    layout: Literal["joint", "independent"] = "joint"
    """joint: the target follows the context, as in [BOS context SEP][target EOS]. independent: two documents."""

    @property
    def pairing(self) -> Pairing | None:
        """Pairing of the views; None: there is no term on pairs."""
        return None

    @property
    def spans(self) -> SpanSampling | None:
        """Sampling of spans from the documents; None: there is no term on spans."""
        return None

    @property
    def ends(self) -> bool:
        """Whether a term needs the hidden states at the ends of views."""
        return False

    @property
    def has_negatives(self) -> bool:
        """Whether the term on pairs compares a prediction with other targets too."""
        return False

    @property
    def changes_during_run(self) -> bool:
        """Whether weights or the dropout depend on the consumed fraction of the budget."""
        return False

    def loss_dropout(self, fraction: float) -> float:
        """Return the loss dropout when `fraction` of the budget is used."""
        return 0.0

    def record_dropout(self, fraction: float) -> float:
        """Return the fraction of the records without pairs in a step that begins at a consumed fraction of the budget.

        1 means that no record has pairs, because the terms are switched off.
        """
        return self.loss_dropout(fraction)

    def make_layout(
        self,
        specials: SpecialTokenIds,
        views: int,
        lm_views: str,
        train_end_token: bool = True,
        *,
        validating: bool = False,
    ) -> Layout:
        """Return the layout of a record with `views` views.

        With `validating` and at least two views, the layout has pairs for any objective, because the embedding monitors
        need them.
        """
        pairing = self.pairing
        if validating and pairing is None and views > 1:
            pairing = Pairing()
        return make_layout(
            self.layout,
            specials,
            views=views,
            pairing=pairing,
            spans=self.spans,
            ends=self.ends,
            lm_views=lm_views,
            train_end_token=train_end_token,
        )

    @property
    def embedding_group(self) -> str:
        """Group of metric tags for the embeddings of the pair term: `embedding_in_context`, or else `embedding`."""
        return "embedding_in_context" if self.pairing is not None and self.pairing.in_context else "embedding"

    def validation_layouts(
        self, specials: SpecialTokenIds, views: int, lm_views: str, train_end_token: bool = True
    ) -> dict[str, Layout]:
        """Return the layouts whose pairs the embedding monitors read, by group of metric tags.

        The first one also has what the loss terms need. In the group `embedding`, targets are encoded separately.
        """
        trained = self.make_layout(specials, views, lm_views, train_end_token, validating=True)
        layouts = {self.embedding_group: trained}
        if self.pairing is not None and self.pairing.in_context:
            separate = replace(self.pairing, in_context=False)
            layouts["embedding"] = make_layout(
                self.layout,
                specials,
                views=views,
                pairing=separate,
                lm_views=lm_views,
                train_end_token=train_end_token,
            )
        return layouts

    def factor(self, fraction: float) -> float:
        """Return the factor for the weights of all terms except `lm` when `fraction` of the budget is used."""
        return 1.0
