"""Yelp reviews: a review and its number of stars. The labels 0 to 4 on the hub stand for 1 to 5 stars."""

from data_prep.tasks.row_format import Columns, RowFormat, label_number, to_text

LABELS = ("1", "2", "3", "4", "5")


def views(row: Columns) -> tuple[str, str]:
    """Return the review and its number of stars."""
    return to_text(row["text"]), LABELS[label_number(row["label"], len(LABELS))]


ROW_FORMAT = RowFormat(frozenset({"text", "label"}), views, "text")
