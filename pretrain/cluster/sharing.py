"""Marker files that show whether nodes see each other's files."""

from pathlib import Path
from typing import Any


def _marker_name(token: str, author: str) -> str:
    return f".doctor-{token}-{author}"


def nearest_existing_folder(path: str) -> Path:
    """Return the folder itself if it exists here, else its nearest parent that exists."""
    absolute = Path(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


def write_marker(folder: str, token: str, author: str) -> dict[str, Any]:
    """Write the marker file of `author`. If that fails, the result holds the reason as `error`."""
    try:
        (Path(folder) / _marker_name(token, author)).write_text(token)
    except OSError as error:
        return {"error": error.strerror}
    return {}


def visible_markers(folder: str, token: str, authors: list[str]) -> list[str]:
    """Return the authors whose markers can be read here.

    The markers are opened by name, because a network file system may list a folder from its cache.
    """
    return [author for author in authors if _is_readable(Path(folder) / _marker_name(token, author), token)]


def remove_markers(folder: str, token: str) -> None:
    """Delete the markers that are visible here."""
    for marker in Path(folder).glob(_marker_name(token, "*")):
        marker.unlink(missing_ok=True)


def _is_readable(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False
