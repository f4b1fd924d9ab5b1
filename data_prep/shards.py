"""Shards: Arrow IPC files of token lists, one row per record, and the manifest that lists them.

A shard is a single record batch. It has a column `list<uint16>` for each view (`list<uint32>` if the vocabulary has
more than 65,536 tokens; null if the record lacks the view), `continues: bool` and `checksum: uint32`. It is read
through a memory map without copying; Hugging Face `datasets`, pandas and DuckDB can open it too. The tokens of a view
do not include special tokens, which are added when a packed row is laid out. A row with `continues` is a piece of a
long plain document that continues in the next row.

The checksum of a row is the low 32 bits of

    mix(c) + sum over its views v, counted from 0 among the columns, of mix(h(v) ^ mix(v))       modulo 2**64
    h(v) = (sum over the positions i of mix(token i ^ i * 2**32)) ^ mix(number of tokens)

Here mix is SplitMix64 (data_prep/utils/ragged.py). In a row with `continues`, c is 1 + the first token of the next row;
otherwise c is 0.
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
from data_prep.layout import positions_needed
from data_prep.utils.console import UserError
from data_prep.utils.files import atomic_path, sha256_file
from data_prep.utils.ragged import ragged_ranges, ragged_sums, splitmix64

FORMAT = 3
MANIFEST = "manifest.json"
KEYS = {"views": list, "tokenizer": dict, "settings": dict, "sources": list, "splits": dict}
"""Required keys of the manifest, and their types."""


def write_shard(
    path: Path, source: int, views: dict[str, tuple[np.ndarray, np.ndarray]], continues: np.ndarray, vocab_size: int
) -> dict[str, Any]:
    """Write the N records of one shard atomically, and return its manifest entry.

    `views` maps each view to its concatenated tokens and their lengths (N,), 0 if a record lacks the view. `source` is
    the number of the source. `continues` (N,) marks records that continue in the next one. Raises ValueError if the
    last record continues, or if a view has 2**31 tokens or more.
    """
    if len(continues) and continues[-1]:
        raise ValueError("the last record of a shard cannot continue in the next one")
    if any(len(tokens) >= 2**31 for tokens, _ in views.values()):
        raise ValueError("a view has more tokens than the 32-bit offsets of Arrow's lists can address")
    continues = np.asarray(continues, bool)
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    tokens = [np.asarray(tokens, dtype) for tokens, _ in views.values()]
    lengths = np.stack([lengths for _, lengths in views.values()], axis=1).astype(np.int64)
    starts = np.cumsum(lengths, axis=0) - lengths
    continued = np.flatnonzero(continues)
    continuation_tokens = np.full(len(lengths), -1)
    continuation_tokens[continued] = _first_tokens(tokens, starts[continued + 1], lengths[continued + 1])
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
    """Return an Arrow array that shares the memory of a NumPy array.

    `pa.array` would import pandas, which takes a second in every process.
    """
    return pa.Array.from_buffers(kind, length, [None, pa.py_buffer(np.ascontiguousarray(values))])


def _bitmap(bits: np.ndarray) -> pa.Buffer:
    return pa.py_buffer(np.packbits(bits, bitorder="little"))


def view_hashes(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return h(v) of each record, (N,) uint64, from the concatenated tokens of a view and lengths (N,).

    Equal token sequences have equal hashes.
    """
    keys = ragged_ranges(np.zeros_like(lengths), lengths).view(np.uint64)
    keys <<= np.uint64(32)
    keys ^= tokens
    hashes: np.ndarray = ragged_sums(splitmix64(keys), lengths) ^ splitmix64(lengths)
    return hashes


def record_checksums(hashes: np.ndarray, lengths: np.ndarray, continuation_tokens: np.ndarray) -> np.ndarray:
    """Return the checksum of each record, (N,) uint32.

    `hashes` and `lengths` are of shape (N, views). `continuation_tokens` (N,) has the first token of the next row for a
    record that continues there, else -1.
    """
    view_terms = splitmix64(hashes ^ splitmix64(np.arange(hashes.shape[1])))
    total = np.where(lengths > 0, view_terms, np.uint64(0)).sum(axis=1, dtype=np.uint64) + splitmix64(
        continuation_tokens + 1
    )
    low: np.ndarray = total & np.uint64(0xFFFFFFFF)
    return low.astype(np.uint32)


def _first_tokens(values: Sequence[np.ndarray], starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the first token of each record, (N,), from starts and lengths (N, views); -1 for an empty record."""
    out = np.full(len(starts), -1)
    for view in reversed(range(len(values))):
        present = np.flatnonzero(lengths[:, view])
        out[present] = values[view][starts[present, view]]
    return out


@dataclass(frozen=True)
class ViewColumn:
    """One view of a shard. The tokens of record i are `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray
    valid: np.ndarray | None
    """Arrow's bitmap of the records that have the view; None if all have it."""


@dataclass(frozen=True)
class Shard:
    """A memory-mapped shard. Its content is verified when it is read; see `read_rows`."""

    path: Path
    size: int
    """Size of the file, in bytes."""
    columns: list[ViewColumn]
    """Columns in the order of the views."""
    longest: np.ndarray
    """Maximum length of each view according to the manifest, (views,)."""
    continues: np.ndarray | None
    """Arrow's bitmap of the records that continue in the next one; None if there are none."""
    checksums: np.ndarray

    @property
    def held(self) -> np.ndarray:
        """Return the number of tokens of each view, (views,)."""
        return np.array([len(column.values) for column in self.columns])


ShardRows = list[tuple[Shard, np.ndarray]]
"""Row numbers (n,) of each of several shards, N rows in total."""


@dataclass(frozen=True)
class RecordTokens:
    """The tokens of N records. View v of record i is `tokens[starts[i, v]:starts[i, v] + lengths[i, v]]`."""

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    """Lengths of the views, (N, views); 0 if a record lacks the view."""
    hashes: np.ndarray
    """Hashes of the views, (N, views) uint64; equal token sequences have equal hashes."""
    continuation_tokens: np.ndarray
    """First token of the record in which the document continues, (N,); -1 if it ends."""

    def select(self, first: int, stop: int) -> "RecordTokens":
        """Return the records in [first, stop)."""
        part = slice(first, stop)
        return RecordTokens(
            self.tokens, self.starts[part], self.lengths[part], self.hashes[part], self.continuation_tokens[part]
        )

    def view(self, view: int) -> np.ndarray:
        """Return the concatenated tokens of one view of all records."""
        tokens: np.ndarray = self.tokens[ragged_ranges(self.starts[:, view], self.lengths[:, view])]
        return tokens


def open_shard(folder: Path, entry: dict[str, Any], views: list[str]) -> Shard:
    """Memory-map a shard, and check its size and structure against its manifest entry.

    Raises UserError with the path if the file is missing or corrupt.
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
        raise _corrupt_shard(path, f"it has {size} bytes instead of {entry['bytes']}")
    try:
        return _map(path, pa.ipc.open_file(source), entry, views)
    except Exception as error:  # corrupt metadata can cause any error in Arrow
        raise _corrupt_shard(
            path, f"its Arrow structure does not match the manifest ({' '.join(str(error).split())[:100]})"
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
    """Return the number of tokens of each view of rows: (N, views). Raises UserError for an impossible length."""
    return _bounds(parts)[1]


def read_rows(parts: ShardRows) -> RecordTokens:
    """Return the tokens of rows, and verify their checksums.

    Raises UserError with the shard and the row of the first wrong checksum.
    """
    begins, lengths = _bounds(parts)
    continuation_tokens = np.concatenate([_continuation_tokens(shard, rows) for shard, rows in parts])
    first_rows = np.cumsum([0] + [len(rows) for _, rows in parts])
    totals = lengths.sum(axis=0)
    tokens = np.empty(totals.sum(), np.result_type(*(column.values.dtype for column in parts[0][0].columns)))
    starts, hashes = np.empty_like(lengths), np.empty(lengths.shape, np.uint64)
    for view, offset in enumerate(np.cumsum(totals) - totals):
        ends = np.cumsum(lengths[:, view])
        view_tokens = tokens[offset : offset + totals[view]]
        source = ragged_ranges(begins[:, view], lengths[:, view])
        bounds = np.concatenate([[0], ends])[first_rows]
        for (shard, _), low, high in zip(parts, bounds[:-1], bounds[1:], strict=True):
            view_tokens[low:high] = shard.columns[view].values[source[low:high]]
        starts[:, view] = offset + ends - lengths[:, view]
        hashes[:, view] = view_hashes(view_tokens, lengths[:, view])
    stored = np.concatenate([shard.checksums[rows] for shard, rows in parts])
    _raise_for_rows(parts, record_checksums(hashes, lengths, continuation_tokens) != stored, "its checksum is wrong")
    return RecordTokens(tokens, starts, lengths, hashes, continuation_tokens)


def _check_sizes(parts: ShardRows) -> None:
    """Raise UserError if a file was truncated after it was mapped.

    Reading beyond the end of the file would kill the process with SIGBUS.
    """
    for shard, _ in parts:
        with contextlib.suppress(OSError):  # a deleted file stays mapped
            size = shard.path.stat().st_size
            if size < shard.size:
                raise _corrupt_shard(shard.path, f"it has {size} bytes instead of {shard.size}")


def _bounds(parts: ShardRows) -> tuple[np.ndarray, np.ndarray]:
    """Return the start and the length of each view of rows, (N, views) each."""
    _check_sizes(parts)

    def offsets(shift: int) -> np.ndarray:
        by_shard = [
            np.stack([column.offsets[rows + shift] for column in shard.columns], axis=1) for shard, rows in parts
        ]
        return np.concatenate(by_shard).astype(np.int64)

    begins, ends = offsets(0), offsets(1)
    counts = [len(rows) for _, rows in parts]
    longest, held = (
        np.repeat(np.stack([getattr(shard, name) for shard, _ in parts]), counts, axis=0)
        for name in ("longest", "held")
    )
    lengths = ends - begins
    wrong = ((begins < 0) | (lengths < 0) | (lengths > longest) | (ends > held)).any(axis=1)
    present = np.concatenate([_present(shard, rows) for shard, rows in parts])
    _raise_for_rows(parts, wrong | (present != (lengths > 0)).any(axis=1), "its view lengths are wrong")
    return begins, lengths


def _present(shard: Shard, rows: np.ndarray) -> np.ndarray:
    """Return the mask of the views that rows have according to Arrow's bitmaps, (n, views)."""
    return np.stack(
        [np.ones(len(rows), bool) if column.valid is None else _bits(column.valid, rows) for column in shard.columns],
        axis=1,
    )


def _bits(bitmap: np.ndarray, rows: np.ndarray) -> np.ndarray:
    bits: np.ndarray = (bitmap[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 1
    return bits


def _continuation_tokens(shard: Shard, rows: np.ndarray) -> np.ndarray:
    """Return the first token of the next row for each row that continues there, else -1: (n,)."""
    out = np.full(len(rows), -1)
    if shard.continues is not None:
        continued = np.flatnonzero(_bits(shard.continues, rows))
        following = rows[continued] + 1
        _raise_for_rows(
            [(shard, rows[continued])], following >= len(shard.checksums), "it continues beyond the last row"
        )
        if len(following):
            begins, lengths = _bounds([(shard, following)])
            out[continued] = _first_tokens([column.values for column in shard.columns], begins, lengths)
    return out


def _raise_for_rows(parts: ShardRows, wrong: np.ndarray, problem: str) -> None:
    """Raise UserError for the first row of the mask `wrong`, (N,) over all parts."""
    if wrong.any():
        index = int(np.argmax(wrong))
        for shard, rows in parts:
            if index < len(rows):
                raise _corrupt_shard(shard.path, f"row {rows[index]}, counted from 0: {problem}")
            index -= len(rows)


def _corrupt_shard(path: Path, problem: str) -> UserError:
    """Return the error for a corrupt shard."""
    return UserError(f"the shard {path} is corrupt or from a different preparation: {problem}; {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"remove the folder {path.parent} and prepare the corpus again"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a prepared corpus. Raises UserError if there is none that this version can read."""
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
    stored_format = manifest.get("format") if isinstance(manifest, dict) else None
    if stored_format != FORMAT:
        raise UserError(
            f"{folder / MANIFEST} has format {stored_format!r}, but this version reads {FORMAT}; "
            "prepare the corpus again"
        )
    missing = [key for key, kind in KEYS.items() if not isinstance(manifest.get(key), kind)]
    if missing:
        raise UserError(
            f"{folder / MANIFEST} is corrupt: it has no {' and no '.join(missing)}; "
            "remove the folder and prepare the corpus again"
        )
    return manifest
