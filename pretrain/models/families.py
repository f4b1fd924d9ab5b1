"""Model families that transformers does not have, imported only if one of them is built or loaded."""

import contextlib
import importlib
import json
from pathlib import Path

MODULES = {"openelm": "pretrain.models.openelm"}
"""Modules that register a family with the auto classes of transformers, by family."""


def register_family(family: str) -> None:
    """Register a family with the auto classes of transformers, if transformers does not have it."""
    if family in MODULES:
        importlib.import_module(MODULES[family])


def register_family_from_folder(folder: str | Path) -> None:
    """Register the family of a Hugging Face folder.

    A config.json that cannot be read is ignored here, because transformers reports it later.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        register_family(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type"))
