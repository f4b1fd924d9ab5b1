"""Add the outermost rule of each regular expression to a file of NL-RX, as labels for the evaluation task `probe`.

    python benchmarks/regex_roots.py data/nl-rx-synth/test.jsonl runs/data/roots-test.jsonl

The output has the columns text, code and root. data_prep/nlrx_grammar.py describes the rules.
"""

import argparse
import json
import re
from pathlib import Path

from data_prep.config import JsonSource
from data_prep.task_rows import read_rows
from data_prep.utils.console import UserError, exit_on_user_error

VIEWS = ("text", "code")
SHAPES = {
    "not": r"~G",
    "words": r"\\b.*\\b",
    "before": r"G\.\*G\.\*",
    "starting": r"G\(\.\*\)",
    "ending": r"\(\.\*\)G",
    "at_least_once": r"G\+",
    "zero_or_more": r"G\*",
    "n_or_more": r"G\{\d,\}",
    "and": r"G&G",
    "or": r"G\|G",
    "containing": r"\.\*.*\.\*",
    "followed": r"[^G]+\.\*[^G]+\.\*",
    "only": r"\w+|\.|\[[\w-]+\]",
}
"""Patterns of the outermost rule of an expression whose outermost groups are replaced by G, in order of precedence."""


def root(expression: str) -> str:
    """Return the outermost rule of an expression of NL-RX. Raises UserError for another text."""
    shape, depth, group = "", 0, ""
    for character in expression:
        depth -= character == ")"
        if depth:
            group += character
        elif character == ")":
            shape += "(.*)" if group == ".*" else "G"
            group = ""
        elif character != "(":
            shape += character
        depth += character == "("
    found = next((name for name, pattern in SHAPES.items() if re.fullmatch(pattern, shape)), None)
    if found is None:
        raise UserError(f"{expression!r} is not an expression of NL-RX; remove its row")
    return found


def label(source: str, output: Path) -> None:
    """Write the rows of a file with their labels."""
    rows = read_rows(JsonSource(type="json", path=source), VIEWS, "the file")
    output.parent.mkdir(parents=True, exist_ok=True)
    records = ({"text": row.context, "code": row.target, "root": root(row.target)} for row in rows)
    output.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="file of NL-RX with the columns text and code, or with messages")
    parser.add_argument("output", type=Path, help="JSON lines with the labels")
    arguments = parser.parse_args()
    exit_on_user_error(lambda: label(arguments.source, arguments.output))
