"""The families of models: the causal language models of transformers, and the ones that the project registers.

The module of a family is imported only when the family is needed.
"""

import contextlib
import importlib
import json
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILY_MODULES = {"openelm": "pretrain.models.openelm"}
"""Modules that register a family with the auto classes of transformers, by family."""


def family_names() -> list[str]:
    """Return the names of all families, in the form of `model_type` in a config.json."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *FAMILY_MODULES})


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
