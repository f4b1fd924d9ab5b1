"""What is minimised: one file per objective, found by the name of the file.

An objective is a pure function of hidden states and batch that returns sums, never means. Normalisation is done in one place,
`total_loss`: each term's sum over all ranks and micro batches of a step, by its count over the same.
"""

import importlib
import pkgutil
from functools import cache

from pretrain.objectives.base import Objective, ObjectiveConfig, Output, total_loss

__all__ = ["Objective", "ObjectiveConfig", "Output", "objective_configs", "total_loss"]


@cache
def objective_configs() -> dict[str, type[ObjectiveConfig]]:
    """The configuration section of each objective, by name: the class `Config` of the file `NAME.py` in this folder."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {module.__name__.rsplit(".", 1)[1]: module.Config for module in modules if hasattr(module, "Config")}
