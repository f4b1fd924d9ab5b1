"""The model families that every test of families covers, with what a reference needs to know about them."""

import itertools
from collections.abc import Sequence
from typing import Any

FAMILIES = ("llama", "gemma2", "olmo2", "openelm", "qwen3", "mistral", "smollm3", "olmo3", "gemma3_text")
"""Families with a shape for tests, configs/models/FAMILY_tiny.yaml."""
SCALED = ("gemma2", "gemma3_text")
"""Families that multiply their token embeddings by the square root of their width."""


def family_cases(*options: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return test cases (family, *options): every combination for the first four families, which differ most.

    Each other family has one case, the last of every option.
    """
    combinations = list(itertools.product(*options))
    others = [(family, *combinations[-1]) for family in FAMILIES[4:]]
    return [(family, *combination) for family in FAMILIES[:4] for combination in combinations] + others


def family_of(name: str) -> str:
    """Return the family of a file in configs/models, such as gemma3_text for gemma3_text_tiny."""
    return name.rpartition("_")[0]


def embedding_scale(config: Any) -> float:
    """Return the factor by which a model multiplies its token embeddings."""
    return config.hidden_size**0.5 if config.model_type in SCALED else 1.0
