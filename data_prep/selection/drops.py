"""Counts and first examples of dropped records and of unknown tokens."""

from typing import Any

MAX_EXAMPLES = 5
"""Examples kept per reason."""
EXCERPT = 60
"""Characters of a record that an example shows."""
REASONS = {
    "damaged": "the file is corrupt at this place, and everything after it is lost",
    "malformed": "the line is not a valid record",
    "unparsable": "the file cannot be parsed as Python",
    "empty": "no view holds text",
    "one_sided": "a view holds no text; set data.missing_views=keep to keep the other views",
    "nul": "a view contains a NUL character, probably binary data",
    "too_short": "a view has fewer characters than data.filters.min_characters",
    "too_many_characters": "a view has more characters than data.filters.max_characters",
    "forbidden": "data.filters.forbidden matches in a view",
    "contaminated": "the record is in a test file of evaluation.tasks; set data.decontaminate=false to keep it",
    "duplicate": "another record of the corpus has the same views; set data.deduplicate=none to keep both",
    "near_duplicate": "another record of the corpus has almost the same views",
    "too_long": "the record with the copies of its views does not fit into a row of data.sequence_length",
}


class DropCounter:
    """Counts and examples of the drops of one unit. An example is (piece, position in the piece, note)."""

    def __init__(self) -> None:
        self.by_reason: dict[str, dict[str, Any]] = {}

    def add(self, reason: str, piece: int, position: int, note: str) -> None:
        """Count a dropped record, and keep it as an example if there are fewer than MAX_EXAMPLES."""
        entry = self.by_reason.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < MAX_EXAMPLES:
            entry["first"].append([piece, position, note])


def unknown_tokens(split: str, entry: dict[str, Any]) -> str:
    """Return a line about the unknown tokens of a split.

    The line is empty if there are none, or if the corpus was prepared before they were counted.
    """
    unknown = entry.get("unknown", {"tokens": 0})
    if not unknown["tokens"]:
        return ""
    return (
        f"{unknown['tokens']:,} tokens in {unknown['records']:,} records of split {split} are unknown to the "
        f"tokenizer, so their text is lost; the first: {unknown['first'][0]}"
    )


def excerpt(views: tuple[str, ...]) -> str:
    """Return the beginning of a record on one line."""
    text = " | ".join(" ".join(view[: 2 * EXCERPT].split()) for view in views if view.strip())
    return repr(text if len(text) <= EXCERPT else text[: EXCERPT - 3] + "...")
