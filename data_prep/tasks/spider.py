"""Spider: a question about a database, and its query. The context names the database as in the public LLM-JEPA data."""

import re

from data_prep.tasks.row_format import Columns, RowFormat, to_text


def views(row: Columns) -> tuple[str, str]:
    """Return the context (the name of the database and the question) and the query."""
    return f"For db_id:[{to_text(row['db_id'])}]\n\n{to_text(row['question'])}", to_text(row["query"])


PROMPT = re.compile(r"For db_id:\[(?P<db_id>[^\]]+)\]\n\n(?P<question>.+)", re.DOTALL)
ROW_FORMAT = RowFormat(frozenset({"db_id", "question", "query"}), views, "question", PROMPT)
