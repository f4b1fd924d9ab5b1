"""The configurations of objectives: one file per objective, found by name. None of them imports torch."""

import importlib
import pkgutil
from functools import cache

from pretrain.objectives.configs.base import ObjectiveConfig

__all__ = ["ObjectiveConfig", "objective_configs"]


@cache
def objective_configs() -> dict[str, type[ObjectiveConfig]]:
    """Return the configuration class of each objective by name: the class `Config` of `NAME.py` in this folder."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.__name__.rsplit(".", 1)[1]: module.Config for module in modules if hasattr(module, "Config")}
