"""GSM8K: a problem and its solution, which ends in `#### NUMBER`."""

from data_prep.tasks.row_format import RowFormat, to_text

ROW_FORMAT = RowFormat(
    frozenset({"question", "answer"}), lambda row: (to_text(row["question"]), to_text(row["answer"])), "question"
)
