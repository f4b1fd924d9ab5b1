"""What is minimised. An objective is a pure function of hidden states and batch that returns sums, never means.

Normalisation is done in one place, `total_loss`: each term's sum over all ranks and micro batches of a step, by its count
over the same.
"""

from pretrain.config import ObjectiveConfig
from pretrain.objectives.base import Objective, Output, total_loss
from pretrain.objectives.llm_jepa import LlmJepa
from pretrain.objectives.next_token import NextToken

__all__ = ["Objective", "Output", "make_objective", "total_loss"]


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective of a configuration."""
    match config.name:
        case "next_token":
            return NextToken()
        case "llm_jepa":
            return LlmJepa(config.weight, config.distance, config.temperature)
