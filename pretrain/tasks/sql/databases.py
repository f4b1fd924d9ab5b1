"""Lookup of the SQLite file that the queries of a row run on."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.utils.console import UserError

if TYPE_CHECKING:
    from data_prep.task_rows import Row

DATABASE = re.compile(r"For db_id:\[([^\]]+)\]")
"""Pattern of the database name in the contexts of the public LLM-JEPA data."""
MAGIC = b"SQLite format 3\0"


def find_databases(rows: "Sequence[Row]", databases: Path, key: str = "task.databases") -> list[Path | None]:
    """Return the SQLite file of each row, or None for a row without a database.

    `databases` is a folder of SQLite files, or one file for all rows. Raises UserError if no row has a
    database, if a file is not a SQLite file, or if it has changes that are not merged yet.
    """
    paths = [databases if databases.is_file() else _database(row, databases) for row in rows]
    if not any(paths):
        name = database_name(rows[0])
        raise UserError(
            f"{databases} ({key}) has no database for any row: "
            + (
                f"the first row needs {name}.sqlite or {name}/{name}.sqlite; add it"
                if name
                else "the rows name no database, neither in a column db_id nor as `For db_id:[NAME]` in the context; "
                "give one file for all rows"
            )
        )
    for path in {path for path in paths if path}:
        _check(path, key)
    return paths


def _check(path: Path, key: str) -> None:
    with open(path, "rb") as file:
        start = file.read(len(MAGIC))
    if start not in (MAGIC, b""):
        raise UserError(f"{path} ({key}) is not a SQLite file: it begins with {start!r}; replace it")
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and log.stat().st_size:
        raise UserError(
            f"{path} ({key}) would be read without the changes in {log.name}; merge them first: "
            f"sqlite3 {path} 'PRAGMA wal_checkpoint(TRUNCATE)'"
        )


def database_name(row: "Row") -> str | None:
    """Return the name of a row's database; None if there is no name, or if it is not a plain file name."""
    name = row.columns.get("db_id")
    if name is None:
        match = DATABASE.search(row.context)
        name = match and match[1]
    return name if isinstance(name, str) and Path(name).name == name else None  # no path out of the folder


def _database(row: "Row", folder: Path) -> Path | None:
    name = database_name(row)
    candidates = (folder / f"{name}.sqlite", folder / name / f"{name}.sqlite") if name else ()
    return next((path for path in candidates if path.is_file()), None)
