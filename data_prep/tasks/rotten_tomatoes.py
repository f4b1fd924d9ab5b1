"""Rotten Tomatoes: a sentence of a review, and whether it is good or bad."""

from data_prep.tasks.form import Columns, PublicForm, label_number, text_of

LABELS = ("Bad", "Good")
"""Words of the public LLM-JEPA data for the numbers of the hub."""


def views(row: Columns) -> tuple[str, str]:
    """Return the sentence and the word of its label."""
    return text_of(row["text"]), LABELS[label_number(row["label"], len(LABELS))]


FORM = PublicForm(frozenset({"text", "label"}), views, "text")
