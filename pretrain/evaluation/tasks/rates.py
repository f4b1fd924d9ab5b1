"""Shares of rows."""

import math
from collections.abc import Iterable, Sequence


def rate(hits: Iterable[bool]) -> float:
    """The share of hits."""
    hits = list(hits)
    return sum(hits) / len(hits)


def rate_of(name: str, hits: Sequence[bool], chosen: Sequence[bool] | None) -> dict[str, float]:
    """The share of hits among the chosen rows, by its name; nothing where none is chosen, or it is not known which (None)."""
    if chosen is None:
        return {}
    among = [hit for hit, is_chosen in zip(hits, chosen, strict=True) if is_chosen]
    return {name: rate(among)} if among else {}


def sole_best(values: Sequence[float], chosen: int) -> bool:
    """Whether the chosen value is above all others: in a tie none is, nor where a value is -inf, which could not be measured."""
    return min(values) > -math.inf and all(values[chosen] > value for place, value in enumerate(values) if place != chosen)
