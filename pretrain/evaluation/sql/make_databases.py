"""SQLite files for the schemas of Spider, filled with rows that its queries find.

    python -m pretrain.evaluation.sql.make_databases tables.json --queries train.jsonl test.jsonl --output databases

Use Spider's own databases if you have them; the schemas and queries alone are easier to obtain. Each query adds rows to
the tables that it reads, containing the values with which it compares their columns. All other values are drawn at
random, with a fixed seed. Values of columns that a foreign key connects are drawn from the same small pool, so joins
find matching rows.
The command prints the queries that do not run and the fraction of queries that return no rows.
"""

import argparse
import json
import random
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.config import JsonSource
from data_prep.task_rows import read_rows
from data_prep.tasks import public_row_format
from data_prep.utils.console import UserError, exit_on_user_error
from pretrain.tasks.sql.databases import database_name
from pretrain.tasks.sql.execution import QueryRunner, tokens

MIN_ROWS, MAX_ROWS = 24, 60
"""Minimum and maximum number of rows of a table."""
POOL_SIZE = 12
"""Minimum number of values from which a column is drawn that no foreign key connects; otherwise MIN_ROWS."""
COMPARISONS = ("=", "!=", "<>", "<", ">", "<=", ">=", "like", "in", "between")
NUMBER = re.compile(r"-?\d+(\.\d+)?")

Values = dict[tuple[str, str], list[Any]]
"""Values with which one query compares each column, by (table, column) in lower case."""


def main() -> None:
    """Parse the command line and write the databases."""
    parser = argparse.ArgumentParser(
        description="Make SQLite files for the schemas of Spider, filled with rows that its queries find."
    )
    parser.add_argument("tables", type=Path, help="tables.json of Spider")
    parser.add_argument(
        "--queries",
        type=Path,
        nargs="+",
        required=True,
        help="JSON lines of questions and queries, in the format of the task spider",
    )
    parser.add_argument("--output", type=Path, required=True, help="output folder of the SQLite files")
    arguments = parser.parse_args()
    exit_on_user_error(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    queries: dict[str, list[str]] = defaultdict(list)
    for path in arguments.queries:
        for row in read_rows(
            JsonSource(type="json", path=str(path)),
            ("text", "code"),
            "--queries",
            row_format=public_row_format("spider"),
        ):
            queries[database_name(row) or ""].append(row.target)
    try:
        schemas = json.loads(arguments.tables.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {arguments.tables} ({error}); pass the path of Spider's tables.json") from None
    make_databases(schemas, queries, arguments.output)
    failed, empty = check_queries(queries, arguments.output)
    total = sum(map(len, queries.values()))
    for line in failed:
        print(f"does not run: {line}")
    print(
        f"wrote {len(schemas)} databases to {arguments.output}; of {total:,} queries, {len(failed)} do not run and "
        f"{empty:,} ({empty / total:.1%}) return no rows"
    )


def make_databases(schemas: list[dict[str, Any]], queries: dict[str, list[str]], folder: Path) -> None:
    """Write DB.sqlite for each schema of tables.json; `queries` lists the queries on each database."""
    folder.mkdir(parents=True, exist_ok=True)
    for schema in schemas:
        path = folder / f"{schema['db_id']}.sqlite"
        path.unlink(missing_ok=True)
        connection = sqlite3.connect(path)
        with connection:
            _Filler(schema, queries.get(schema["db_id"], [])).write(connection)
        connection.close()


def check_queries(queries: dict[str, list[str]], folder: Path) -> tuple[list[str], int]:
    """Return the queries that do not run, with the reason, and the number of queries that return no rows."""
    failed, empty = [], 0
    with QueryRunner() as runner:
        for name, database_queries in queries.items():
            for query in database_queries:
                outcome = runner.run(folder / f"{name}.sqlite", query)
                if outcome.rows is None:
                    failed.append(f"{name}: {query} ({outcome.error})")
                else:
                    empty += not outcome.rows
    return failed, empty


class _Filler:
    """The rows of one database."""

    def __init__(self, schema: dict[str, Any], queries: Iterable[str]):
        self.random = random.Random(schema["db_id"])
        self.tables = schema["table_names_original"]
        self.columns: dict[int, list[int]] = defaultdict(list)
        self.names, self.types = schema["column_names_original"], schema["column_types"]
        for number, (table, _) in enumerate(self.names):
            if table >= 0:
                self.columns[table].append(number)
        self.primary = {
            number for key in schema["primary_keys"] for number in (key if isinstance(key, list) else [key])
        }
        self.group_of_column = list(range(len(self.names)))  # foreign keys connect the columns of a group
        for first, second in schema["foreign_keys"]:
            old, new = self.group_of_column[first], self.group_of_column[second]
            self.group_of_column = [new if group == old else group for group in self.group_of_column]
        columns_of = {
            table.lower(): {self.names[number][1].lower() for number in self.columns[index]}
            for index, table in enumerate(self.tables)
        }
        self.values_by_query = [values for query in queries if (values := compared_values(query, columns_of))]
        self.pools: dict[int, list[Any]] = defaultdict(list)
        for number, (table, name) in enumerate(self.names):
            if table >= 0:
                compared = [
                    value
                    for values in self.values_by_query
                    for value in values.get((self.tables[table].lower(), name.lower()), [])
                ]
                pool = self.pools[self.group_of_column[number]]
                pool += [value for value in dict.fromkeys(compared) if value not in pool]

    def write(self, connection: sqlite3.Connection) -> None:
        """Create and fill all tables."""
        for table, name in enumerate(self.tables):
            if name.lower() == "sqlite_sequence":
                continue  # SQLite maintains this table
            kinds = {number: "NUMERIC" if self.types[number] == "number" else "TEXT" for number in self.columns[table]}
            columns = ", ".join(f'"{self.names[number][1]}" {kind}' for number, kind in kinds.items())
            connection.execute(f'CREATE TABLE "{name}" ({columns})')
            placeholders = ", ".join("?" * len(self.columns[table]))
            connection.executemany(f'INSERT INTO "{name}" VALUES ({placeholders})', self._rows(table))

    def _rows(self, table: int) -> list[tuple[Any, ...]]:
        """Return the rows of a table: first rows with the values of a query, then rows of drawn values.

        In the first rows, drawn values fill the columns that the query does not compare.
        """
        name = self.tables[table].lower()
        wanted = []
        for values in self.values_by_query:
            compared = {column: choices for (owner, column), choices in values.items() if owner == name}
            longest = max(map(len, compared.values()), default=0)
            for index in range(longest):
                wanted.append({column: choices[index % len(choices)] for column, choices in compared.items()})
        wanted = [dict(row) for row in dict.fromkeys(tuple(sorted(row.items(), key=str)) for row in wanted)]
        self.random.shuffle(wanted)
        count = min(max(MIN_ROWS, 2 * len(wanted)), MAX_ROWS)
        wanted += [{}] * (count - len(wanted))
        by_column = [
            self._column(number, [row.get(self.names[number][1].lower()) for row in wanted[:count]])
            for number in self.columns[table]
        ]
        return list(zip(*by_column, strict=True))

    def _column(self, number: int, wanted: list[Any]) -> list[Any]:
        """Return the values of a column: `wanted`, with drawn values instead of None.

        In a primary key of one column, repeated values are replaced too.
        """
        pool = list(self.pools[self.group_of_column[number]])
        connected = self.group_of_column.count(self.group_of_column[number]) > 1
        table, _ = self.names[number]
        if [column for column in self.primary if self.names[column][0] == table] == [number]:
            unused = [
                value for value in pool + self._made_up_values(number, len(wanted) + len(pool)) if value not in wanted
            ]
            values: list[Any] = []
            for value in wanted:
                values.append(unused.pop(0) if value is None or value in values else value)
            return values
        pool_size = MIN_ROWS if connected else POOL_SIZE
        pool += self._made_up_values(number, max(pool_size - len(pool), 0) + 2)
        if connected:
            pool = pool[: max(1, len(pool) * 2 // 3)]  # some rows are referenced several times, others never
        drawn = [pool[index % len(pool)] for index in range(len(wanted))]
        self.random.shuffle(drawn)
        return [value if value is not None else other for value, other in zip(wanted, drawn, strict=True)]

    def _made_up_values(self, number: int, count: int) -> list[Any]:
        """Return `count` made-up values. Connected columns get the same values."""
        if self.types[self.group_of_column[number]] == "number" or self.types[number] == "number":
            return list(range(1, count + 1))
        kind = self.names[self.group_of_column[number]][1].lower()
        if self.types[number] == "time" or "date" in kind:
            return [f"{2000 + index % 20}-{1 + index % 12:02d}-{1 + index % 28:02d}" for index in range(count)]
        return [f"{kind} {index}" for index in range(1, count + 1)]


def compared_values(query: str, columns_of: dict[str, set[str]]) -> Values:
    """Return the values with which a query compares the columns of its tables.

    These are the literals of the query. For `<` and `>` they are replaced by values that satisfy the comparison. For
    `!=`, one such value is added.
    """
    words = tokens(query)
    tables = {word: word for word in words if word in columns_of}
    tables |= {
        words[index + 2]: words[index]
        for index in range(len(words) - 2)
        if words[index] in columns_of and words[index + 1] == "as"
    }
    found: Values = defaultdict(list)
    for index, word in enumerate(words):
        after = words[index + 1 : index + 16]
        after = after[1:] if after[:1] == ["not"] else after
        if not after or after[0] not in COMPARISONS:
            continue
        owner = tables.get(words[index - 2]) if index >= 2 and words[index - 1] == "." else None
        owners = [owner] if owner else [table for table in dict.fromkeys(tables.values()) if word in columns_of[table]]
        for value in _literals(after[1:], after[0]):
            for table in owners:
                if word in columns_of[table]:
                    found[table, word].append(value)
    return dict(found)


def _literals(words: list[str], comparison: str) -> list[Any]:
    """Return the values of the literals directly after a comparison, adjusted to it (see `compared_values`)."""
    found: list[Any] = []
    joined = {"in": ("(", ","), "between": ("and",)}.get(comparison, ())
    index = 0
    while index < len(words):
        word = words[index]
        length = 3 if words[index + 1 : index + 2] == ["."] else 1
        number = "".join(words[index : index + length])
        if word[0] in "'\"":
            found.append(word[1:-1].replace("%", "") or "x")
        elif NUMBER.fullmatch(number):
            value = float(number) if "." in number else int(number)
            found += {"<": [value - 1], ">": [value + 1], "!=": [value, value + 1]}.get(comparison, [value])
            index += number.count(".") * 2
        elif word not in joined:
            break
        index += 1
    return found


if __name__ == "__main__":
    main()
