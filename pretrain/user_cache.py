"""Results that are kept between processes, in files of the user's cache folder.

A result is valid for one key, which describes everything that it depends on. A cache that cannot be read or written is
the same as an empty one.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from data_prep.utils.files import read_json_or_none, write_text

FOLDER = "jepa-pretrain"


def read_cached(name: str, key: str) -> Any:
    """Return the result in the file `name` if it was stored with this key, and None otherwise."""
    with contextlib.suppress(OSError, RuntimeError):
        stored = read_json_or_none(_folder() / name)
        if isinstance(stored, dict) and stored.get("key") == key:
            return stored.get("value")
    return None


def write_cached(name: str, key: str, value: Any) -> None:
    """Store a result, which must not be None, in the file `name`; the result of another key is overwritten."""
    with contextlib.suppress(OSError, RuntimeError):
        _folder().mkdir(parents=True, exist_ok=True)
        write_text(_folder() / name, json.dumps({"key": key, "value": value}))


def _folder() -> Path:
    """Return the folder of this project in the user's cache. Raises RuntimeError if the user has no home."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / FOLDER
