"""HellaSwag: the beginning of a text, four endings, and the index of the correct one.

The test split on the hub has no labels.
"""

from data_prep.tasks.row_format import Columns, RowFormat, label_number, to_text


def choices(row: Columns) -> tuple[list[str], int]:
    """Return the endings of a row and the index of the correct one.

    Raises KeyError or ValueError if the endings or the label are missing or invalid.
    """
    endings = row["endings"]
    if not isinstance(endings, list):
        raise ValueError("the endings are not a list of texts")
    return [to_text(text) for text in endings], label_number(row["label"], len(endings))


def views(row: Columns) -> tuple[str, str]:
    """Return the beginning and the correct ending."""
    endings, correct_index = choices(row)
    return to_text(row["ctx"]), endings[correct_index]


ROW_FORMAT = RowFormat(frozenset({"ctx", "endings", "label"}), views, "ctx")
