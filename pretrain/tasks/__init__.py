"""Downstream tasks: one file for each, with its options, its metrics and its score. None of them imports torch.

`NAME.py` has a class `Config` and `METRICS`. A task that scores answers or likelihoods also has `evaluate`, a function from a
TaskRun to a TaskResult; the module of the same name in `pretrain/evaluation/model_tasks` has it for a task that looks into the model.
If a public data set has rows of its own form, `data_prep/tasks/NAME.py` says how they become views.
"""

import importlib
import pkgutil
from functools import cache

from pretrain.tasks.options import TaskConfig

__all__ = ["task_configs"]


@cache
def task_configs() -> dict[str, type[TaskConfig]]:
    """Return the options of each task by its name: the class `Config` of the file `NAME.py` in this folder."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.__name__.rsplit(".", 1)[1]: module.Config for module in modules if hasattr(module, "Config")}
