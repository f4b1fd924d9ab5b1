"""The warning about collapsed embeddings."""

import logging
from typing import TYPE_CHECKING, Any

from pretrain.objectives.collapse import has_collapsed
from pretrain.training.hooks import Hook, StepReport

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

logger = logging.getLogger(__name__)


class CollapseWarning(Hook):
    """A hook that warns once when the embeddings collapse, and again if they collapse after a recovery.

    It judges the monitors of validations, or of the training steps if there is no validation. While the terms are
    switched off it judges nothing, because nothing trains the embeddings then.
    """

    def __init__(self) -> None:
        self.collapsed = False

    def after_step(self, run: "Trainer", report: StepReport) -> None:
        """Judge a step."""
        if report.progress_line and run.validation is None:
            self._judge(run, report.values, f"{run.config.objective.embedding_group}/")

    def after_validation(self, run: "Trainer", values: dict[str, float]) -> None:
        """Judge a validation."""
        self._judge(run, values, f"validation/{run.config.objective.embedding_group}/")

    def state(self) -> dict[str, Any]:
        """Return whether the embeddings had collapsed."""
        return {"collapsed": self.collapsed}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.collapsed = state["collapsed"]

    def _judge(self, run: "Trainer", values: dict[str, float], prefix: str) -> None:
        if run.config.objective.factor(run.fraction) == 0:
            return
        monitors = {tag.removeprefix(prefix): value for tag, value in values.items() if tag.startswith(prefix)}
        had_collapsed = self.collapsed
        pairing = run.config.objective.pairing
        self.collapsed = pairing is not None and has_collapsed(monitors, pairing.in_context)
        if self.collapsed and not had_collapsed:
            logger.warning(collapse_message(monitors, run.config.objective.has_negatives, run.fraction))


EARLY = 0.1
"""Fraction of the budget before which a collapse is often temporary."""


def collapse_message(monitors: dict[str, float], has_negatives: bool, fraction: float) -> str:
    """Return the text of the warning after a fraction of the budget.

    It explains the problem, because the loss curve looks like success.
    """
    remedy = (
        "Use larger micro batches, which hold more negatives, or objective.regularizers"
        if has_negatives
        else "Distances without negatives tend to cause this. Use info_nce, which has negatives, or "
        "objective.regularizers"
    )
    if fraction < EARLY:
        remedy = f"After {fraction:.0%} of the budget, this may pass. If it does not: {remedy[0].lower()}{remedy[1:]}"
    return (
        f"the embeddings have collapsed: a pair's two views have cosine {monitors['paired_cosine']:.4f}, "
        f"unrelated views {monitors['shuffled_cosine']:.4f}; retrieval@1 is {monitors['retrieval_at_1']:.1%}. A low "
        "loss/jepa means nothing then, because the model maps everything to few directions. " + remedy
    )
