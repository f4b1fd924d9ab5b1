"""Yelp reviews: a review and its stars. The labels 0 to 4 of the hub are 1 to 5 stars."""

from data_prep.tasks.form import Columns, PublicForm, label_number, text_of

LABELS = ("1", "2", "3", "4", "5")


def views(row: Columns) -> tuple[str, str]:
    """Return the review and its stars."""
    return text_of(row["text"]), LABELS[label_number(row["label"], len(LABELS))]


FORM = PublicForm(frozenset({"text", "label"}), views, "text")
