"""Counts and first examples of dropped records and of unknown tokens."""

from typing import Any

MAX_EXAMPLES = 5
"""Examples kept per reason."""
EXCERPT = 60
"""Characters of a record that an example shows."""
REASONS = {
    "damaged": "the file is damaged there, and the rest of it is lost",
    "malformed": "the line is no record",
    "unparsable": "the file is no program text that can be parsed",
    "empty": "no view holds text",
    "one_sided": "a view holds no text; data.missing_views: keep takes the others",
    "nul": "a view holds a NUL character, as binary data does",
    "too_short": "a view has fewer characters than data.filters.min_characters",
    "too_many_characters": "a view has more characters than data.filters.max_characters",
    "forbidden": "data.filters.forbidden matches in a view",
    "contaminated": "the record stands in a test file of evaluation.tasks; data.decontaminate: false keeps such records",
    "duplicate": "another record of the corpus has the same views; data.deduplicate: none keeps both",
    "near_duplicate": "another record of the corpus has almost the same views",
    "too_long": "the record does not fit a row of data.sequence_length with the copies of its views",
}


class DropCounter:
    """The drops of one unit; an example is (piece, position in it, what is to be seen there)."""

    def __init__(self) -> None:
        self.by_reason: dict[str, dict[str, Any]] = {}

    def add(self, reason: str, piece: int, position: int, note: str) -> None:
        """Count one; the first ones become examples."""
        entry = self.by_reason.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < MAX_EXAMPLES:
            entry["first"].append([piece, position, note])


def unknown_tokens(split: str, entry: dict[str, Any]) -> str:
    """Return a line about the unknown tokens of a split; empty if it has none, or was prepared when they were not counted."""
    unknown = entry.get("unknown", {"tokens": 0})
    if not unknown["tokens"]:
        return ""
    return (
        f"{unknown['tokens']:,} tokens in {unknown['records']:,} records of split {split} are unknown to the tokenizer, so their text is lost; "
        f"the first: {unknown['first'][0]}"
    )


def excerpt(views: tuple[str, ...]) -> str:
    """Return the beginning of a record, in one line."""
    text = " | ".join(" ".join(view[: 2 * EXCERPT].split()) for view in views if view.strip())
    return repr(text if len(text) <= EXCERPT else text[: EXCERPT - 3] + "...")
