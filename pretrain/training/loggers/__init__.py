"""Loggers: hooks on the main rank that record the values of the steps.

`metrics_file.py` is always in use. Each name in monitor.loggers is a module of this package with a class `Logger`, a
hook without constructor arguments. A new logger is a new module here.
"""

import importlib
import pkgutil
from collections.abc import Sequence

from data_prep.utils.console import UserError
from pretrain.training.hooks import Hook


def check_loggers(names: Sequence[str]) -> None:
    """Raise UserError if a name in monitor.loggers is unknown or listed twice. Modules are not imported."""
    modules = [module.name for module in pkgutil.iter_modules(__path__)]
    known = [name for name in modules if name != "metrics_file" and not name.startswith("_")]
    for name in names:
        if name == "metrics_file":
            raise UserError("monitor.loggers: metrics_file is always in use; remove it")
        if name not in known:
            raise UserError(
                f"monitor.loggers: there is no logger {name!r} in pretrain/training/loggers; choose from "
                f"{', '.join(known)}"
            )
        if list(names).count(name) > 1:
            raise UserError(f"monitor.loggers: {name} is listed twice; remove one")


def build_loggers(names: Sequence[str]) -> list[Hook]:
    """Return the logger that writes metrics.jsonl, followed by the named loggers."""
    return [importlib.import_module(f"{__name__}.{name}").Logger() for name in ("metrics_file", *names)]
