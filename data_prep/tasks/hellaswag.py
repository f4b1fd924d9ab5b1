"""HellaSwag: the beginning of a text, four endings, and which one is right. The test split of the hub has no labels."""

from data_prep.tasks.row_format import Columns, RowFormat, label_number, to_text


def choices(row: Columns) -> tuple[list[str], int]:
    """Return the endings of a row, and the number of the right one. Raises KeyError or ValueError for a row without them."""
    endings = row["endings"]
    if not isinstance(endings, list):
        raise ValueError("endings that are not a list of texts")
    return [to_text(text) for text in endings], label_number(row["label"], len(endings))


def views(row: Columns) -> tuple[str, str]:
    """Return the beginning and the right ending."""
    endings, right = choices(row)
    return to_text(row["ctx"]), endings[right]


ROW_FORMAT = RowFormat(frozenset({"ctx", "endings", "label"}), views, "ctx")
