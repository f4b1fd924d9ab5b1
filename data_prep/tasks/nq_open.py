"""NQ-Open: a question and its right answers. The first one is trained on."""

from typing import Any

from data_prep.tasks.row_format import Columns, RowFormat, to_text


def right_answers(answer: Any) -> list[str]:
    """Return all right answers of the column `answer`. Raises ValueError for what is neither a text nor a list of texts."""
    return [to_text(text) for text in answer] if isinstance(answer, list) else [to_text(answer)]


def views(row: Columns) -> tuple[str, str]:
    """Return the question and the first of its right answers."""
    return to_text(row["question"]), right_answers(row["answer"])[0]


ROW_FORMAT = RowFormat(frozenset({"question", "answer"}), views, "question")
