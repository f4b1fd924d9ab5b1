"""Shards: Arrow IPC files of token lists, one row a record, and the manifest that lists them.

A shard is a single record batch: a column `list<uint16>` a view (`list<uint32>` from 65,537 tokens of vocabulary on; null where the
record lacks the view), `continues: bool` and `checksum: uint32`. It is read through a memory map without copying; Hugging Face
`datasets`, pandas and DuckDB open it too. Tokens are the bare views: special tokens are added when a row is laid out. A row with
`continues` is a piece of a long plain document that goes on in the next row.

The checksum of a row is the low 32 bits of

    mix(c) + sum over its views v, counted from 0 among the columns, of mix(h(v) ^ mix(v))       modulo 2**64
    h(v) = (sum over the places i of mix(token i ^ i * 2**32)) ^ mix(number of tokens)

where mix is SplitMix64 (data_prep/ragged.py), and c is 0, or, in a row with `continues`, 1 + the first token of the next row.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from data_prep.config import CHECKSUM, CONTINUES
from data_prep.console import UserError
from data_prep.files import atomic_path, sha256_file
from data_prep.ragged import ragged_ranges, ragged_sums, splitmix64

FORMAT = 3
MANIFEST = "manifest.json"
KEYS = {"views": list, "tokenizer": dict, "settings": dict, "sources": list, "splits": dict}
"""What readers of the manifest look for."""
MOST_PREDICTOR_TOKENS = 12


def positions_needed(lengths: np.ndarray) -> np.ndarray:
    """Positions that a record needs where each view predicts the next with appended predictor tokens, (N,) from view lengths (N, views).

    The joint layout holds every view once and all but the first a second time, an end token with each, and the predictor tokens of all but the last.
    """
    present = (lengths > 0).sum(axis=1)
    first = lengths[np.arange(len(lengths)), (lengths > 0).argmax(axis=1)]
    needed: np.ndarray = (
        2 * lengths.sum(axis=1) - first + 2 * present + np.maximum(0, present - 1) * MOST_PREDICTOR_TOKENS
    )
    return needed


def write_shard(
    path: Path, source: int, views: dict[str, tuple[np.ndarray, np.ndarray]], continues: np.ndarray, vocab_size: int
) -> dict[str, Any]:
    """Write the N records of one shard atomically; return its manifest entry.

    Each of `views` is its tokens, concatenated, and the lengths (N,), 0 where a record lacks the view. `source` is the number of the
    source, `continues` (N,) tells which records go on in the next one. Raises ValueError where the last is one of those, and for 2**31 tokens.
    """
    if len(continues) and continues[-1]:
        raise ValueError("the last record of a shard cannot go on in the next")
    if any(len(tokens) >= 2**31 for tokens, _ in views.values()):
        raise ValueError("more tokens than the offsets of Arrow's lists can count")
    continues = np.asarray(continues, bool)
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    tokens = [np.asarray(tokens, dtype) for tokens, _ in views.values()]
    lengths = np.stack([lengths for _, lengths in views.values()], axis=1).astype(np.int64)
    starts = np.cumsum(lengths, axis=0) - lengths
    goes_on = np.flatnonzero(continues)
    continuation_tokens = np.full(len(lengths), -1)
    continuation_tokens[goes_on] = _first_tokens(tokens, starts[goes_on + 1], lengths[goes_on + 1])
    by_view = list(zip(tokens, lengths.T, strict=True))
    checksums = record_checksums(
        np.stack([view_hashes(*view) for view in by_view], axis=1), lengths, continuation_tokens
    )
    columns = {name: _list_array(*view) for name, view in zip(views, by_view, strict=True)}
    columns[CONTINUES] = pa.Array.from_buffers(pa.bool_(), len(continues), [None, _bitmap(continues)])
    columns[CHECKSUM] = _array(pa.uint32(), len(checksums), checksums)
    batch = pa.record_batch(columns)
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, batch.schema) as writer,
    ):
        writer.write_batch(batch)
    pieces = continues | np.concatenate([[False], continues[:-1]])
    return {
        "file": path.name,
        "source": source,
        "records": len(lengths),
        "incomplete": int((lengths == 0).any(axis=1).sum()),
        "continued": int(continues.sum()),
        "tokens": {view: int(total) for view, total in zip(views, lengths.sum(axis=0), strict=True)},
        "longest": {view: int(longest) for view, longest in zip(views, lengths.max(axis=0, initial=0), strict=True)},
        "positions_needed": int(positions_needed(lengths[~pieces]).max(initial=0)),
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
    }


def _list_array(tokens: np.ndarray, lengths: np.ndarray) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    present = lengths > 0
    valid = None if present.all() else _bitmap(present)
    values = _array(pa.from_numpy_dtype(tokens.dtype), len(tokens), tokens)
    return pa.Array.from_buffers(pa.list_(values.type), len(lengths), [valid, pa.py_buffer(offsets)], children=[values])


def _array(kind: pa.DataType, length: int, values: np.ndarray) -> pa.Array:
    """An Arrow array over the memory of a NumPy one; `pa.array` would import pandas, which takes a second in every process."""
    return pa.Array.from_buffers(kind, length, [None, pa.py_buffer(np.ascontiguousarray(values))])


def _bitmap(bits: np.ndarray) -> pa.Buffer:
    return pa.py_buffer(np.packbits(bits, bitorder="little"))


def view_hashes(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """h(v) of each record: the view's tokens, concatenated, and lengths (N,) -> (N,) uint64. Equal tokens have equal hashes."""
    place = ragged_ranges(np.zeros_like(lengths), lengths).view(np.uint64)
    place <<= np.uint64(32)
    place ^= tokens
    hashes: np.ndarray = ragged_sums(splitmix64(place), lengths) ^ splitmix64(lengths)
    return hashes


def record_checksums(hashes: np.ndarray, lengths: np.ndarray, continuation_tokens: np.ndarray) -> np.ndarray:
    """Hashes and lengths of the views (N, views), the first token of the next row or -1 (N,) -> (N,) uint32."""
    numbered = splitmix64(hashes ^ splitmix64(np.arange(hashes.shape[1])))
    total = np.where(lengths > 0, numbered, np.uint64(0)).sum(axis=1, dtype=np.uint64) + splitmix64(
        continuation_tokens + 1
    )
    low: np.ndarray = total & np.uint64(0xFFFFFFFF)
    return low.astype(np.uint32)


def _first_tokens(values: Sequence[np.ndarray], starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The first token of each record's first view, (N,), from starts and lengths (N, views); -1 without any."""
    out = np.full(len(starts), -1)
    for view in reversed(range(len(values))):
        present = np.flatnonzero(lengths[:, view])
        out[present] = values[view][starts[present, view]]
    return out


@dataclass(frozen=True)
class ViewColumn:
    """One view of a shard: record i holds `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray
    valid: np.ndarray | None
    """Arrow's bitmap of the records that have the view; None: all have."""


@dataclass(frozen=True)
class Shard:
    """A shard, memory-mapped. What it holds is verified when it is read, see `read_rows`."""

    path: Path
    size: int
    """Bytes of the file."""
    columns: list[ViewColumn]
    """By view."""
    longest: np.ndarray
    """(views,) what the manifest says."""
    continues: np.ndarray | None
    """Arrow's bitmap; None: no record does."""
    checksums: np.ndarray

    @property
    def held(self) -> np.ndarray:
        """Tokens of each view, (views,)."""
        return np.array([len(column.values) for column in self.columns])


ShardRows = list[tuple[Shard, np.ndarray]]
"""Rows of several shards, (n,) of each, N in all."""


@dataclass(frozen=True)
class RecordTokens:
    """The tokens of N records: those of view v of record i are `tokens[starts[i, v]:starts[i, v] + lengths[i, v]]`."""

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    """(N, views), 0 where a record lacks the view."""
    hashes: np.ndarray
    """(N, views) uint64: equal tokens have equal hashes."""
    continuation_tokens: np.ndarray
    """(N,) the first token of the record in which the document goes on; -1 where it ends."""

    def select(self, first: int, stop: int) -> "RecordTokens":
        """Records first to stop."""
        part = slice(first, stop)
        return RecordTokens(
            self.tokens, self.starts[part], self.lengths[part], self.hashes[part], self.continuation_tokens[part]
        )

    def view(self, view: int) -> np.ndarray:
        """The tokens of one view of all records, concatenated."""
        tokens: np.ndarray = self.tokens[ragged_ranges(self.starts[:, view], self.lengths[:, view])]
        return tokens


def open_shard(folder: Path, entry: dict[str, Any], views: list[str]) -> Shard:
    """Memory-map a shard whose size and structure are those of its manifest entry.

    Raises UserError naming the file where it is missing or damaged.
    """
    path = folder / entry["file"]
    try:
        size = path.stat().st_size
        if size == entry["bytes"]:
            source = pa.memory_map(str(path))
    except FileNotFoundError:
        raise UserError(f"the shard {path} is missing; {_remedy(path)}") from None
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror or error}") from None
    if size != entry["bytes"]:
        raise damaged(path, f"it has {size} bytes, the manifest says {entry['bytes']}")
    try:
        return _map(path, pa.ipc.open_file(source), entry, views)
    except Exception as error:  # whatever Arrow finds in damaged metadata
        raise damaged(
            path, f"its Arrow structure is not that of the manifest ({' '.join(str(error).split())[:100]})"
        ) from None


def _map(path: Path, file: pa.ipc.RecordBatchFileReader, entry: dict[str, Any], views: list[str]) -> Shard:
    batch = file.get_batch(0)
    if (
        file.num_record_batches != 1
        or batch.num_rows != entry["records"]
        or batch.schema.names != [*views, CONTINUES, CHECKSUM]
    ):
        raise ValueError(f"{batch.num_rows} rows of {', '.join(batch.schema.names)}")
    columns = []
    for view in views:
        kind = batch.schema.field(view).type
        if kind not in (pa.list_(pa.uint16()), pa.list_(pa.uint32())):
            raise ValueError(f"{view} is {kind}")
        valid, offsets, _, values = batch.column(view).buffers()
        columns.append(
            ViewColumn(
                np.frombuffer(values, kind.value_type.to_pandas_dtype(), entry["tokens"][view])
                if entry["tokens"][view]
                else np.zeros(0, np.uint16),
                np.frombuffer(offsets, np.int32, entry["records"] + 1),
                None if valid is None else np.frombuffer(valid, np.uint8, -(-entry["records"] // 8)),
            )
        )
    if batch.schema.types[-2:] != [pa.bool_(), pa.uint32()]:
        raise ValueError(f"{CONTINUES} and {CHECKSUM} are {batch.schema.types[-2:]}")
    bits = batch.column(CONTINUES).buffers()[1]
    return Shard(
        path,
        entry["bytes"],
        columns,
        np.array([entry["longest"][view] for view in views]),
        np.frombuffer(bits, np.uint8, -(-entry["records"] // 8)) if entry["continued"] else None,
        np.frombuffer(batch.column(CHECKSUM).buffers()[1], np.uint32, entry["records"]),
    )


def row_lengths(parts: ShardRows) -> np.ndarray:
    """Tokens of each view of rows: (N, views). Raises UserError naming shard and row where they cannot be."""
    return _bounds(parts)[1]


def read_rows(parts: ShardRows) -> RecordTokens:
    """The tokens of rows, every checksum verified. Raises UserError naming shard and row where one does not hold."""
    begins, lengths = _bounds(parts)
    continuation_tokens = np.concatenate([_closing(shard, rows) for shard, rows in parts])
    first = np.cumsum([0] + [len(rows) for _, rows in parts])
    totals = lengths.sum(axis=0)
    tokens = np.empty(totals.sum(), np.result_type(*(column.values.dtype for column in parts[0][0].columns)))
    starts, hashes = np.empty_like(lengths), np.empty(lengths.shape, np.uint64)
    for view, offset in enumerate(np.cumsum(totals) - totals):
        ends = np.cumsum(lengths[:, view])
        of_view = tokens[offset : offset + totals[view]]
        source = ragged_ranges(begins[:, view], lengths[:, view])
        bounds = np.concatenate([[0], ends])[first]
        for (shard, _), low, high in zip(parts, bounds[:-1], bounds[1:], strict=True):
            of_view[low:high] = shard.columns[view].values[source[low:high]]
        starts[:, view] = offset + ends - lengths[:, view]
        hashes[:, view] = view_hashes(of_view, lengths[:, view])
    stored = np.concatenate([shard.checksums[rows] for shard, rows in parts])
    _refuse(parts, record_checksums(hashes, lengths, continuation_tokens) != stored, "its checksum does not hold")
    return RecordTokens(tokens, starts, lengths, hashes, continuation_tokens)


def _check_sizes(parts: ShardRows) -> None:
    """Raise UserError for a file that was truncated since it was mapped: reading behind its end would kill the process by SIGBUS."""
    for shard, _ in parts:
        with contextlib.suppress(OSError):  # a file that is gone stays mapped
            size = shard.path.stat().st_size
            if size < shard.size:
                raise damaged(shard.path, f"it has {size} bytes, the manifest says {shard.size}")


def _bounds(parts: ShardRows) -> tuple[np.ndarray, np.ndarray]:
    """Where each view of rows begins, and its length, (N, views) each."""
    _check_sizes(parts)
    begins, ends = (
        np.concatenate(
            [np.stack([column.offsets[rows + after] for column in shard.columns], axis=1) for shard, rows in parts]
        ).astype(np.int64)
        for after in (0, 1)
    )
    counts = [len(rows) for _, rows in parts]
    longest, held = (
        np.repeat(np.stack([getattr(shard, name) for shard, _ in parts]), counts, axis=0)
        for name in ("longest", "held")
    )
    lengths = ends - begins
    wrong = ((begins < 0) | (lengths < 0) | (lengths > longest) | (ends > held)).any(axis=1)
    present = np.concatenate([_present(shard, rows) for shard, rows in parts])
    _refuse(parts, wrong | (present != (lengths > 0)).any(axis=1), "its lengths are not those that were written")
    return begins, lengths


def _present(shard: Shard, rows: np.ndarray) -> np.ndarray:
    """Which views Arrow says that rows have, (n, views)."""
    return np.stack(
        [np.ones(len(rows), bool) if column.valid is None else _bits(column.valid, rows) for column in shard.columns],
        axis=1,
    )


def _bits(bitmap: np.ndarray, rows: np.ndarray) -> np.ndarray:
    bits: np.ndarray = (bitmap[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 1
    return bits


def _closing(shard: Shard, rows: np.ndarray) -> np.ndarray:
    """The first token of the next row where a row goes on there, else -1: (n,)."""
    out = np.full(len(rows), -1)
    if shard.continues is not None:
        goes_on = np.flatnonzero(_bits(shard.continues, rows))
        following = rows[goes_on] + 1
        _refuse([(shard, rows[goes_on])], following >= len(shard.checksums), "it goes on behind the last row")
        if len(following):
            begins, lengths = _bounds([(shard, following)])
            out[goes_on] = _first_tokens([column.values for column in shard.columns], begins, lengths)
    return out


def _refuse(parts: ShardRows, wrong: np.ndarray, what: str) -> None:
    """Raise UserError for the first row that is wrong, (N,) over all parts."""
    if wrong.any():
        place = int(np.argmax(wrong))
        for shard, rows in parts:
            if place < len(rows):
                raise damaged(shard.path, f"row {rows[place]}, counted from 0: {what}")
            place -= len(rows)


def damaged(path: Path, what: str) -> UserError:
    """That a shard is not as it was written."""
    return UserError(f"the shard {path} is damaged or of another run: {what}; {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"remove the folder {path.parent} and prepare the corpus again"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared corpus. Raises UserError where there is none."""
    manifest: dict[str, Any]
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"there is no prepared corpus in {folder} (data.path); "
            "prepare it first: python -m data_prep CONFIG, with the same key=value overrides"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {folder / MANIFEST}: {error}; remove the folder and prepare the corpus again"
        ) from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{folder / MANIFEST} has format {found!r}, this version reads {FORMAT}; prepare the corpus again"
        )
    lacks = [key for key, kind in KEYS.items() if not isinstance(manifest.get(key), kind)]
    if lacks:
        raise UserError(
            f"{folder / MANIFEST} is damaged, it has no {' and no '.join(lacks)}; remove the folder and prepare the corpus again"
        )
    return manifest
