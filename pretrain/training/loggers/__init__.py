"""Loggers: hooks on the main rank that record the values of the steps.

`metrics_file.py` is always in use. Each name in monitor.loggers is a module of this package with a class `Logger`, a
hook without constructor arguments. A new logger is a new module here. The loggers of TRACKERS need an
extra, and their constructors get the configuration and the run folder.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.utils.console import UserError
from pretrain.config import RunConfig
from pretrain.sections import TRACKERS
from pretrain.tasks.options import check_package
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


def check_trackers(config: RunConfig) -> None:
    """Raise UserError if the package of a tracker is not installed, or nobody is logged in. Only rank 0 needs both."""
    for name in trackers(config):
        check_package(name, name, f"monitor.loggers: {name}")
        _module(name).check(config)


def trackers(config: RunConfig) -> list[str]:
    """Return the experiment trackers among the loggers."""
    return [name for name in config.monitor.loggers if name in TRACKERS]


def build_loggers(config: RunConfig) -> list[Hook]:
    """Return the logger that writes metrics.jsonl, followed by the loggers of the configuration."""
    return [
        _module(name).Logger(config, config.run_dir) if name in TRACKERS else _module(name).Logger()
        for name in ("metrics_file", *config.monitor.loggers)
    ]


def send_evaluations(config: RunConfig, run_dir: Path, results: list[dict[str, Any]]) -> None:
    """Send the evaluations of a run to its trackers; `results` are all that are valid."""
    for name in trackers(config):
        _module(name).Logger(config, run_dir).send_evaluations(results)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
