"""Which records are left out by the text of their views, and why."""

import re
from functools import cache

from data_prep.config import FiltersConfig


def why_filtered(views: tuple[str, ...], filters: FiltersConfig) -> str:
    """Return the first reason to leave a record out, in this order, or "": `nul`, `too_short`, `too_many_characters`, `forbidden`.

    `views` has "" for a view that the record lacks: no filter looks at it. Lengths are in characters (code points).
    """
    present = [view for view in views if view]
    lengths = list(map(len, present))
    if "\0" in "".join(present):
        return "nul"
    if lengths and min(lengths) < filters.min_characters:
        return "too_short"
    if lengths and filters.max_characters is not None and max(lengths) > filters.max_characters:
        return "too_many_characters"
    if filters.forbidden is not None:
        expression = _compiled(filters.forbidden)
        if any(expression.search(view) for view in present):
            return "forbidden"
    return ""


@cache
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)
