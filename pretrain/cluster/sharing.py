"""Marker files that show whether nodes see each other's files."""

from pathlib import Path
from typing import Any


def _marker_name(token: str, author: str) -> str:
    return f".doctor-{token}-{author}"


def nearest_existing_folder(path: str) -> Path:
    """Return the folder if it exists on this machine, else its nearest existing parent."""
    absolute = Path(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


def write_marker(folder: str, token: str, author: str) -> dict[str, Any]:
    """Write the marker file of `author`. Returns {} on success, and otherwise the reason as `error`."""
    try:
        (Path(folder) / _marker_name(token, author)).write_text(token)
    except OSError as error:
        return {"error": error.strerror}
    return {}


def visible_markers(folder: str, token: str, authors: list[str]) -> list[str]:
    """Return the authors whose markers this machine can read.

    The markers are opened by name, because a network file system may list a folder from its cache.
    """
    return [author for author in authors if _contains_token(Path(folder) / _marker_name(token, author), token)]


def remove_markers(folder: str, token: str) -> None:
    """Delete the markers that this machine sees."""
    for marker in Path(folder).glob(_marker_name(token, "*")):
        marker.unlink(missing_ok=True)


def _contains_token(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False
