"""Files that are either whole or absent: written beside their place, flushed to disk, then renamed."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success it is synced and renamed to `path`, on an error removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def try_lock(path: Path) -> IO[bytes] | None:
    """Lock a file until it is closed or the process ends, however it ends; None where another process holds it."""
    file = open(path, "wb")  # noqa: SIM115 (open as long as the lock)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files below a folder without their permissions, so that the copy of a read-only folder can be written to."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, readable by people: indented, with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a file of `write_json`."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines. Raises OSError and ValueError. Lines end with a line feed alone: U+0085 or U+2028 may stand in texts."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_json_or_none(path: Path) -> Any:
    """The value of a file of `write_json`; None where there is none, or it is not whole."""
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError):
        return None


def sync_file(path: Path) -> None:
    """Flush a file's bytes, so that a rename never puts an empty file in place of a whole one."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename inside it outlasts a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
