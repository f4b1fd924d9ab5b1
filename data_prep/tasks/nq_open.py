"""NQ-Open: a question and its correct answers. The first answer is the target in training."""

from typing import Any

from data_prep.tasks.row_format import Columns, RowFormat, to_text


def correct_answers(answer: Any) -> list[str]:
    """Return all correct answers in the column `answer`. Raises ValueError if it is not a text or a list of texts."""
    return [to_text(text) for text in answer] if isinstance(answer, list) else [to_text(answer)]


def views(row: Columns) -> tuple[str, str]:
    """Return the question and the first of its correct answers."""
    return to_text(row["question"]), correct_answers(row["answer"])[0]


ROW_FORMAT = RowFormat(frozenset({"question", "answer"}), views, "question")
