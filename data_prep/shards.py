"""Shards: Arrow IPC files of token lists, one row a record, and the manifest that lists them.

A shard holds one column a view, `list<uint16>` or, from 65,537 tokens of vocabulary on, `list<uint32>`, in a
single record batch. It is read through a memory map without copying; Hugging Face `datasets`, pandas and DuckDB
open it too. Tokens are the bare views: special tokens are added when a row is laid out.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from data_prep.console import UserError
from data_prep.files import atomic_path, sha256_file

FORMAT = 2
MANIFEST = "manifest.json"
MOST_PREDICTOR_TOKENS = 12


def positions_needed(lengths: np.ndarray) -> np.ndarray:
    """Positions that a record needs where each view predicts the next with appended predictor tokens, (N,) from view lengths (N, views).

    The joint layout holds every view once and all but the first a second time, an end token with each, and the predictor tokens of all but the last.
    """
    present = (lengths > 0).sum(axis=1)
    first = lengths[np.arange(len(lengths)), (lengths > 0).argmax(axis=1)]
    return 2 * lengths.sum(axis=1) - first + 2 * present + np.maximum(0, present - 1) * MOST_PREDICTOR_TOKENS


@dataclass(frozen=True)
class ViewColumn:
    """One view of a shard: record i holds `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray


def write_shard(path: Path, views: dict[str, list[list[int]]], vocab_size: int) -> dict[str, Any]:
    """Write the records of one shard atomically; return its manifest entry. A view without tokens is one that the record lacks: null."""
    dtype = pa.uint16() if vocab_size <= 2**16 else pa.uint32()
    columns = {view: pa.array([tokens or None for tokens in records], pa.list_(dtype)) for view, records in views.items()}
    batch = pa.record_batch(columns)
    with atomic_path(path) as temporary, pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    lengths = np.stack([np.diff(column.offsets.to_numpy()) for column in columns.values()], axis=1)
    return {
        "file": path.name,
        "records": len(lengths),
        "incomplete": int((lengths == 0).any(axis=1).sum()),
        "tokens": {view: int(total) for view, total in zip(views, lengths.sum(axis=0), strict=True)},
        "longest": {view: int(longest) for view, longest in zip(views, lengths.max(axis=0), strict=True)},
        "positions_needed": int(positions_needed(lengths).max()),
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
    }


def open_shard(folder: Path, entry: dict[str, Any], views: list[str]) -> list[ViewColumn]:
    """Memory-map a shard, once its size and checksum are those of the manifest.

    Raises UserError naming the file where it is missing or damaged.
    """
    path = folder / entry["file"]
    remedy = f"remove the folder {folder} and prepare the corpus again"
    if not path.exists():
        raise UserError(f"the shard {path} is missing; {remedy}")
    if path.stat().st_size != entry["bytes"]:
        raise UserError(f"the shard {path} is damaged or of another run: it has {path.stat().st_size} bytes, "
                        f"the manifest says {entry['bytes']}; {remedy}")
    if sha256_file(path) != entry["sha256"]:
        raise UserError(f"the shard {path} is damaged or of another run: its SHA-256 is not the manifest's; {remedy}")
    table = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    columns = [table.column(view) for view in views]
    return [ViewColumn(column.values.to_numpy(), column.offsets.to_numpy()) for column in columns]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared corpus. Raises UserError where there is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no prepared corpus in {folder} (data.path); "
                        "prepare it first: python -m data_prep CONFIG, with the same key=value overrides") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / MANIFEST}: {error}; remove the folder and prepare the corpus again") from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder / MANIFEST} has format {manifest.get('format')!r}, this version reads {FORMAT}; prepare the corpus again")
    return manifest
