"""Spider: a question on a database, and its query. The context names the database as the public LLM-JEPA data do."""

import re

from data_prep.tasks.form import Columns, PublicForm, text_of


def views(row: Columns) -> tuple[str, str]:
    """Return the question after the name of its database, and the query."""
    return f"For db_id:[{text_of(row['db_id'])}]\n\n{text_of(row['question'])}", text_of(row["query"])


PROMPT = re.compile(r"For db_id:\[(?P<db_id>[^\]]+)\]\n\n(?P<question>.+)", re.DOTALL)
FORM = PublicForm(frozenset({"db_id", "question", "query"}), views, "question", PROMPT)
