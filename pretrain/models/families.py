"""Model families that transformers does not have. Each is imported only if a model of it is built or loaded."""

import contextlib
import importlib
import json
from pathlib import Path

MODULES = {"openelm": "pretrain.models.openelm"}
"""The module that registers a family with the auto classes of transformers, by family."""


def register_family(family: str) -> None:
    """Make the auto classes of transformers know a family; do nothing for one that transformers has."""
    if family in MODULES:
        importlib.import_module(MODULES[family])


def register_family_from_folder(folder: str | Path) -> None:
    """Register the family of a Hugging Face folder; do nothing if its config.json cannot be read, which transformers then reports."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        register_family(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type"))
