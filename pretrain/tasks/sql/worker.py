"""The process that runs queries: it reads requests from stdin and writes replies to stdout, one JSON object per line.

pretrain/tasks/sql/execution.py starts it by path. It imports nothing from the project, so it starts quickly and needs
little memory.

Queries come from a model and are not trusted. A query can only read: the file is opened read-only and immutable, and an
authorizer refuses everything but SELECT. Its time is limited: it is interrupted after `seconds` of processor time. If
SQLite cannot be interrupted, for example inside one long function, the kernel ends the process a second later. Its
memory is limited: there are limits on SQLite's heap, the length of a value, the number of rows and the address space,
and nothing is written to temporary files.
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

MAX_HEAP_BYTES = 256 << 20
"""Limit of SQLite's heap, in bytes."""
ADDRESS_SPACE = 2 << 30
"""Limit of the address space of the process, in bytes."""
LONGEST_VALUE = 4 << 20
"""Longest value, in bytes."""
LONGEST_QUERY = 100_000
"""Longest query, in bytes."""
MAX_RESULT_BYTES = 64 << 20
"""Largest result: characters of text, bytes of blobs, and 8 for any other value."""
CHECK_PERIOD = 10_000
"""Number of SQLite virtual machine instructions between two checks of the time limit."""
ALLOWED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_FUNCTION)
REFUSED_FUNCTIONS = ("load_extension", "fts3_tokenizer")


class TooLargeError(Exception):
    """Error for a result that exceeds a limit; the message names the limit."""


def open_database(path: str) -> sqlite3.Connection:
    """Open a database read-only, with all limits set."""
    connection = sqlite3.connect(
        f"{Path(path).absolute().as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None
    )
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute(f"PRAGMA hard_heap_limit = {MAX_HEAP_BYTES}")
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
    """Run a query and return its rows and its number of columns.

    Raises TooLargeError, sqlite3.Error, sqlite3.Warning, or a built-in exception such as MemoryError.
    """
    deadline = time.process_time() + seconds
    connection.set_progress_handler(lambda: time.process_time() > deadline, CHECK_PERIOD)
    with contextlib.closing(connection.execute(query)) as cursor:
        if cursor.description is None:
            raise sqlite3.ProgrammingError("not a SELECT")
        rows, size = [], 0
        for row in cursor:
            rows.append(row)
            size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
            if len(rows) > max_rows:
                raise TooLargeError(f"more than {max_rows:,} rows")
            if size > MAX_RESULT_BYTES:
                raise TooLargeError(f"more than {MAX_RESULT_BYTES >> 20} MiB")
        return rows, len(cursor.description)


def answer(connections: dict[str, sqlite3.Connection], request: dict[str, Any]) -> str:
    """Run one request and return the reply: a JSON object with `rows` and `columns` (their number), or `error`.

    A blob in a row is {"blob": its hexadecimal digits}. `connections` caches the connection to the latest database.
    """
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
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the default action ends the process at any point
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes the pipe
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connections: dict[str, sqlite3.Connection] = {}
    for line in sys.stdin:
        print(answer(connections, json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
