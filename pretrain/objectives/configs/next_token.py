"""The configuration of next-token prediction."""

from typing import Literal

from pretrain.objectives.configs.base import ObjectiveConfig


class Config(ObjectiveConfig):
    """The language-model loss alone; keys of other objectives are ignored."""

    name: Literal["next_token"]
    """Next-token prediction."""
