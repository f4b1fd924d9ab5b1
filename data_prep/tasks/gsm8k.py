"""GSM8K: a problem, and its worked solution that ends in `#### NUMBER`."""

from data_prep.tasks.form import PublicForm, text_of

FORM = PublicForm(frozenset({"question", "answer"}), lambda row: (text_of(row["question"]), text_of(row["answer"])), "question")
