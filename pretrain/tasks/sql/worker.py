"""The process that runs queries: one JSON object a line in, one out.

pretrain/tasks/sql/execution.py starts it by its path. It imports nothing of the project, so it starts in a moment and
takes little memory.

A query comes from a model, so it may be anything. It can only read: the file is opened read-only and as one that never changes, and an authorizer
refuses everything but SELECT. It cannot run on: it is interrupted after `seconds` of processor time, and where SQLite does not look up, within
one long function, the kernel ends the process a second later. It cannot take all memory: SQLite's heap, the length of a value, the number of
rows and the address space are limited, and nothing is written to temporary files.
"""

import contextlib
import json
import resource
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

HEAP = 256 << 20
ADDRESS_SPACE = 2 << 30
LONGEST_VALUE = 4 << 20
LONGEST_QUERY = 100_000
MOST_BYTES = 64 << 20
"""Of a result."""
PERIOD = 10_000
"""Instructions of SQLite's machine between two looks at the clock."""
ALLOWED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_FUNCTION)
REFUSED_FUNCTIONS = ("load_extension", "fts3_tokenizer")


class TooLarge(Exception):
    """A result over the limits; the message says which."""


def open_database(path: str) -> sqlite3.Connection:
    """Open a file that can only be read from."""
    connection = sqlite3.connect(
        f"{Path(path).absolute().as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None
    )
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute(f"PRAGMA hard_heap_limit = {HEAP}")
    for limit, value in (
        (sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE),
        (sqlite3.SQLITE_LIMIT_SQL_LENGTH, LONGEST_QUERY),
        (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
        (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
    ):
        connection.setlimit(limit, value)
    connection.set_authorizer(authorize)
    return connection


def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """Allow an action of SQLite only if it reads."""
    refused = action not in ALLOWED or (
        action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in REFUSED_FUNCTIONS
    )
    return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK


def run(connection: sqlite3.Connection, query: str, seconds: float, max_rows: int) -> tuple[list[tuple[Any, ...]], int]:
    """Return the rows of a query, and how many columns they have. Raises sqlite3.Error, TooLarge and what else SQLite's binding raises."""
    end = time.process_time() + seconds
    connection.set_progress_handler(lambda: time.process_time() > end, PERIOD)
    with contextlib.closing(connection.execute(query)) as cursor:
        if cursor.description is None:
            raise sqlite3.ProgrammingError("no SELECT")
        rows, size = [], 0
        for row in cursor:
            rows.append(row)
            size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
            if len(rows) > max_rows:
                raise TooLarge(f"more than {max_rows:,} rows")
            if size > MOST_BYTES:
                raise TooLarge(f"more than {MOST_BYTES >> 20} MiB")
        return rows, len(cursor.description)


def answer(connections: dict[str, sqlite3.Connection], request: dict[str, Any]) -> str:
    """Return the reply to one request: a JSON object with `rows` or `error`."""
    signal.setitimer(signal.ITIMER_PROF, request["seconds"] + 1)
    try:
        if request["database"] not in connections:
            connections.clear()
            connections[request["database"]] = open_database(request["database"])
        rows, columns = run(connections[request["database"]], request["query"], request["seconds"], request["max_rows"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        return json.dumps({"rows": rows, "columns": columns}, default=lambda value: {"blob": value.hex()})
    except MemoryError:
        return json.dumps({"error": "out of memory"})
    except Exception as error:
        return json.dumps({"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Answer requests until stdin is closed."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, wherever it is
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connections: dict[str, sqlite3.Connection] = {}
    for line in sys.stdin:
        print(answer(connections, json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
