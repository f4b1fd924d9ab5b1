"""Whether nodes see each other's files."""

from pathlib import Path
from typing import Any


def _note(token: str, author: str) -> str:
    return f".doctor-{token}-{author}"


def nearest_existing_folder(path: str) -> Path:
    """Return the folder itself, or the nearest one above it that exists here."""
    absolute = Path(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


def write_marker(folder: str, token: str, author: str) -> dict[str, Any]:
    """Write a small file; `error` says why that failed."""
    try:
        (Path(folder) / _note(token, author)).write_text(token)
    except OSError as error:
        return {"error": error.strerror}
    return {}


def visible_markers(folder: str, token: str, authors: list[str]) -> list[str]:
    """Whose notes can be read here. Opened by name: a network file system may list a folder from its memory."""
    return [author for author in authors if _readable(Path(folder) / _note(token, author), token)]


def remove_markers(folder: str, token: str) -> None:
    """Take away the notes that can be seen here."""
    for note in Path(folder).glob(_note(token, "*")):
        note.unlink(missing_ok=True)


def _readable(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False
