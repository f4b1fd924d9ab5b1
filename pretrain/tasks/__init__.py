"""Downstream tasks: one file per task, with its options, metrics and scoring. None of them imports torch.

Each `NAME.py` defines a class `Config` and `METRICS`. A task that scores answers or likelihoods also defines
`evaluate`, a function from a TaskRun to a TaskResult. A task that needs the model's embeddings or losses has its
`evaluate` in the module of the same name in `pretrain/evaluation/model_tasks`. A task may also declare properties
of single rows (`pretrain/tasks/rows.py`). If a public data set has its own row format, `data_prep/tasks/NAME.py`
converts its rows to views.
"""

import importlib
import pkgutil
from functools import cache

from pretrain.tasks.options import TaskConfig

__all__ = ["task_configs"]


@cache
def task_configs() -> dict[str, type[TaskConfig]]:
    """Return the options class of each task by task name: the class `Config` of `NAME.py` in this folder."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.__name__.rsplit(".", 1)[1]: module.Config for module in modules if hasattr(module, "Config")}
