"""Execution of queries on SQLite databases, and comparison of their results."""

import json
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

WORKER = Path(__file__).with_name("worker.py")
SECONDS = 5.0
"""Limit of processor time per query, in seconds."""
PATIENCE = 120.0
"""Wall-clock limit per query, in seconds. It ends a process that waits, for example for a file system."""
MOST_ROWS = 100_000
"""Maximum number of rows of a result."""
DIGITS = 9
"""Number of significant digits to which floating-point numbers are compared."""

_TOKENS = re.compile(
    r"""
    (?P<literal> '(?:[^']|'')*'? | "(?:[^"]|"")*"? | `[^`]*`? | \[[^\]]*\]? )
  | (?P<comment> --[^\n]* | /\*.*?(?:\*/|$) )
  | \w+ | [<>!=|]+ | \S""",
    re.S | re.X,
)


class Outcome(NamedTuple):
    """Result of a query."""

    rows: list[tuple[Any, ...]] | None
    """None if the query failed; see `error`."""
    columns: int = 0
    """Number of columns, known even if there are no rows."""
    error: str = ""


class QueryRunner:
    """Runner of queries in a separate process, one at a time.

    If a query ends the process, the next query starts a new one.
    """

    def __init__(self, seconds: float = SECONDS, max_rows: int = MOST_ROWS):
        self._limits = {"seconds": seconds, "max_rows": max_rows}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "QueryRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, database: Path, query: str) -> Outcome:
        """Run a query on a SQLite file, read-only; return its rows, or an error if it fails or exceeds the limits."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None and answers is not None
        timer = threading.Timer(PATIENCE, self._process.kill)
        timer.start()
        try:
            requests.write(json.dumps({"database": str(database), "query": query} | self._limits) + "\n")
            requests.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line.endswith("\n"):
            self._end()
            return Outcome(None, error=f"took longer than {self._limits['seconds']:g} s, or ended the process")
        answer = json.loads(line)
        if "error" in answer:
            return Outcome(None, error=answer["error"])
        rows = [
            tuple(bytes.fromhex(value["blob"]) if isinstance(value, dict) else value for value in row)
            for row in answer["rows"]
        ]
        return Outcome(rows, answer["columns"])

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                stream.close()
            self._process = None


def same_rows(first: list[tuple[Any, ...]], second: list[tuple[Any, ...]], ordered: bool) -> bool:
    """Return whether two results are equal: as lists of rows if `ordered`, else as multisets of rows.

    The order of columns matters; their names do not. If a column holds a floating-point number in either result,
    its numbers are compared to 9 significant digits, so 1 equals 1.0.
    """
    first, second = round_float_columns(first, second)
    return first == second if ordered else Counter(first) == Counter(second)


def round_float_columns(*results: list[tuple[Any, ...]]) -> list[list[tuple[Any, ...]]]:
    """Return the results, with numbers rounded in each column that holds a floating-point number in any result."""
    float_columns = {
        place for rows in results for row in rows for place, value in enumerate(row) if isinstance(value, float)
    }
    return [
        [tuple(_rounded(value) if place in float_columns else value for place, value in enumerate(row)) for row in rows]
        for rows in results
    ]


def _rounded(value: Any) -> Any:
    return float(f"{float(value):.{DIGITS}g}") if isinstance(value, int | float) else value


def normalize_query(query: str) -> str:
    """Normalise a query: no comments, no final semicolon, one space between tokens, lower case outside of quotes."""
    words = tokens(query)
    while words and words[-1] == ";":
        words.pop()
    return " ".join(words)


def tokens(query: str) -> list[str]:
    """Return the tokens of a query without comments, in lower case outside of quotes."""
    return [token for token, _, _ in spans(query)]


def spans(query: str) -> list[tuple[str, int, int]]:
    """Return the tokens of a query, as in `tokens`, each with its start and end offset."""
    return [
        (match[0] if match["literal"] else match[0].lower(), *match.span())
        for match in _TOKENS.finditer(query)
        if not match["comment"]
    ]
