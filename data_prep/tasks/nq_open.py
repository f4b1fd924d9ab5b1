"""NQ-Open: a question and its right answers. The first one is trained on."""

from typing import Any

from data_prep.tasks.form import Columns, PublicForm, text_of


def right_answers(answer: Any) -> list[str]:
    """Return all right answers of the column `answer`. Raises ValueError for what is neither a text nor a list of texts."""
    return [text_of(text) for text in answer] if isinstance(answer, list) else [text_of(answer)]


def views(row: Columns) -> tuple[str, str]:
    """Return the question and the first of its right answers."""
    return text_of(row["question"]), right_answers(row["answer"])[0]


FORM = PublicForm(frozenset({"question", "answer"}), views, "question")
