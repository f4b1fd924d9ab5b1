"""Helpers that read sources as the pipeline does, and write files with the compression that the suffix names."""

import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep.config import DataConfig
from data_prep.sources import open_source
from data_prep.sources.record import Reader
from data_prep.utils.config_file import validate

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
VIEWS = ("text", "code")
needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason=f"the shared data sets are missing; expected them in {SHARED}"
)


def open_reader(names: tuple[str, ...] = VIEWS, /, **source) -> Reader:
    """Validate the settings as part of a configuration, and open the source."""
    if "path" in source:
        source["path"] = str(source["path"])
    config = validate(
        DataConfig, {"path": "x", "views": names, "sources": [source], "tokenizer": {"vocab_size": 300}}, "data"
    )
    return open_source(config.sources[0], names, "data.sources.0")


def read_with_locations(reader: Reader) -> list[tuple]:
    """Return a pair for each record: its views, or (reason, problem) if it cannot be read; and its location."""
    found, counts = [], {}
    for piece in reader.pieces():
        for record in reader.read(piece):
            assert record.position >= 1, record
            assert (record.views is None) == bool(record.problem), record
            assert "\n" not in record.problem, record
            location = reader.place(piece, record.position, counts.get(piece.path, 0))
            found.append((record.views if record.views is not None else (record.reason, record.problem), location))
        counts[piece.path] = counts.get(piece.path, 0) + reader.count(piece)
    return found


def read_views(reader: Reader) -> list[tuple[str, ...]]:
    """Return the views of every record; fail if one has a problem."""
    records = [record for piece in reader.pieces() for record in reader.read(piece)]
    assert all(record.views is not None for record in records), records
    return [record.views for record in records]


def write(path: Path, content: bytes) -> Path:
    """Write a file with the compression that its suffix names, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress_for_suffix(content, path.suffix))
    return path


def compress_for_suffix(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    if suffix == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    return content
