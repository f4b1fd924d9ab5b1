"""Registration of the model families that transformers does not include.

The module of a family is imported only when the family is needed.
"""

import contextlib
import importlib
import json
from pathlib import Path

FAMILY_MODULES = {"openelm": "pretrain.models.openelm"}
"""Modules that register a family with the auto classes of transformers, by family."""


def register_family(family: str) -> None:
    """Register a family with the auto classes of transformers, if transformers does not include it."""
    if family in FAMILY_MODULES:
        importlib.import_module(FAMILY_MODULES[family])


def register_family_from_folder(folder: str | Path) -> None:
    """Register the family of a Hugging Face folder.

    A config.json that cannot be read is ignored here, because transformers reports it later.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        register_family(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type"))
