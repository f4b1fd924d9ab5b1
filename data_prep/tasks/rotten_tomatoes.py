"""Rotten Tomatoes: a sentence of a review, and its sentiment (Good or Bad)."""

from data_prep.tasks.row_format import Columns, RowFormat, label_number, to_text

LABELS = ("Bad", "Good")
"""Words in the public LLM-JEPA data for the numeric labels on the hub."""


def views(row: Columns) -> tuple[str, str]:
    """Return the sentence and the word of its label."""
    return to_text(row["text"]), LABELS[label_number(row["label"], len(LABELS))]


ROW_FORMAT = RowFormat(frozenset({"text", "label"}), views, "text")
