"""Loggers: hooks on the main rank that record the values of the steps.

`metrics_file.py` is always in use. Each name in monitor.loggers is a module of this package with a class `Logger`, a
hook without constructor arguments. A new logger is a new module here.
"""

import importlib

from pretrain.training.hooks import Hook


def build_loggers(names: tuple[str, ...]) -> list[Hook]:
    """Return the logger that writes metrics.jsonl, followed by the named loggers."""
    return [importlib.import_module(f"{__name__}.{name}").Logger() for name in ("metrics_file", *names)]
