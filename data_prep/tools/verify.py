"""Verification of a prepared corpus against its manifest, in several processes and bounded memory."""

import itertools
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from pydantic import BaseModel, Field
from tqdm import tqdm

from data_prep.config import CHECKSUM, CONTINUES
from data_prep.executor import end_with_parent
from data_prep.layout import positions_needed
from data_prep.shards import MANIFEST, read_manifest, record_checksums, view_hashes
from data_prep.tokenizer import Tokenizer
from data_prep.utils.config_file import validate
from data_prep.utils.console import UserError
from data_prep.utils.files import sha256_file

BLOCK_TOKENS = 2**21
"""Approximate number of tokens of a shard that are checked at once."""
Count = Field(ge=0, strict=True)
"""A count in the manifest."""


class _Counts(BaseModel):
    records: int = Count
    incomplete: int = Count
    continued: int = Count
    tokens: dict[str, int]
    longest: dict[str, int]
    positions_needed: int = Count


class _Shard(_Counts):
    file: str = Field(pattern=r"^[^/]+\.arrow$")
    source: int = Count
    bytes: int = Count
    sha256: str


class _Split(_Counts):
    shards: list[_Shard] = Field(min_length=1)


class _Tokenizer(BaseModel):
    sha256: str
    vocab_size: int = Count


class _Source(BaseModel):
    tokens: int = Count


class _Manifest(BaseModel):
    views: list[str] = Field(min_length=1)
    tokenizer: _Tokenizer
    sources: list[_Source]
    splits: dict[str, _Split] = Field(min_length=1)


def verify(folder: Path, workers: int | None = None) -> None:
    """Check every shard of a prepared corpus, and print one line per corrupt shard, or that all shards are valid.

    Runs in `workers` processes, by default one per core. Raises UserError if anything is wrong.
    """
    values = read_manifest(folder)
    try:
        manifest = validate(_Manifest, values)
    except UserError as error:
        raise UserError(f"{folder / MANIFEST} is corrupt: {error}; {_remedy(folder)}") from None
    problems = [*_manifest_faults(manifest), *_folder_faults(folder, manifest)]
    special_ids: frozenset[int] = frozenset()
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer")
        special_ids = tokenizer.special_ids
        if (tokenizer.fingerprint, tokenizer.vocab_size) != (manifest.tokenizer.sha256, manifest.tokenizer.vocab_size):
            problems.append("tokenizer: it is not the tokenizer of the shards")
    except UserError as error:
        problems.append(f"tokenizer: {error}")
    for problem in problems:
        print(problem, flush=True)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    corrupt = 0
    for line in _check_shards(folder, manifest, shards, special_ids, workers):
        corrupt += bool(line)
        if line:
            print(line, flush=True)
    if corrupt or problems:
        raise UserError(
            f"{folder} is not valid: {corrupt:,} of {len(shards):,} shards are corrupt"
            + f", and there are {len(problems):,} other faults" * bool(problems)
            + f" (see the lines above); {_remedy(folder)}"
        )
    records = sum(split.records for split in manifest.splits.values())
    tokens = sum(sum(split.tokens.values()) for split in manifest.splits.values())
    print(f"{len(shards):,} shards, {records:,} records, {tokens:,} tokens: all valid")


def _remedy(folder: Path) -> str:
    return f"copy the corrupt files again from a valid copy, or remove the folder {folder} and prepare the corpus again"


def _manifest_faults(manifest: _Manifest) -> Iterator[str]:
    """Yield the contradictions within the manifest."""
    files: set[str] = set()
    source_tokens = [0] * len(manifest.sources)
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        if shard.source >= len(source_tokens):
            yield f"{MANIFEST}: {shard.file} has source {shard.source}, but `sources` has length {len(source_tokens)}"
        else:
            source_tokens[shard.source] += sum(shard.tokens.values())
    for number, tokens in enumerate(source_tokens):
        yield from _differs(f"{MANIFEST}: sources.{number}.tokens", manifest.sources[number].tokens, tokens)
    for name, split in manifest.splits.items():
        where = f"{MANIFEST}: splits.{name}"
        for shard in split.shards:
            if shard.file in files:
                yield f"{where}: the shard {shard.file} is listed twice"
            files.add(shard.file)
            if not set(shard.tokens) == set(shard.longest) == set(manifest.views):
                shard_views = sorted({*shard.tokens, *shard.longest})
                yield f"{where}: {shard.file} has views {shard_views}, but the corpus has {sorted(manifest.views)}"
        order = [(shard.source, [int(part) for part in re.findall(r"\d+", shard.file)]) for shard in split.shards]
        if order != sorted(order):
            yield f"{where}.shards: the shards are not in the order in which they were written, by source and file"
        for key, combine in (("records", sum), ("incomplete", sum), ("continued", sum), ("positions_needed", max)):
            combined = combine(getattr(shard, key) for shard in split.shards)
            yield from _differs(f"{where}.{key}", getattr(split, key), combined)
        for key, combine in (("tokens", sum), ("longest", max)):
            total = {
                view: combine(getattr(shard, key).get(view, 0) for shard in split.shards) for view in manifest.views
            }
            yield from _differs(f"{where}.{key}", getattr(split, key), total)


def _differs(where: str, stated: Any, counted: Any) -> Iterator[str]:
    if stated != counted:
        yield f"{where} is {stated}, but its shards have {counted}"


def _folder_faults(folder: Path, manifest: _Manifest) -> Iterator[str]:
    """Yield the unexpected files in the folder."""
    listed = {shard.file for split in manifest.splits.values() for shard in split.shards}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".arrow" and path.name not in listed:
            yield f"{path.name}: the manifest does not list this shard"
        elif path.suffix == ".tmp" or path.name == ".partial":
            yield f"{path.name}: leftover of an interrupted preparation; run the same preparation again to remove it"


def _check_shards(
    folder: Path, manifest: _Manifest, shards: list[_Shard], special_ids: frozenset[int], workers: int | None
) -> Iterator[str]:
    """Yield one line with the faults of each shard, in order; an empty line for a valid shard."""
    check = partial(
        _check_shard, folder, views=manifest.views, vocab_size=manifest.tokenizer.vocab_size, special_ids=special_ids
    )
    workers = min(workers or len(os.sched_getaffinity(0)), len(shards))
    with tqdm(
        total=sum(shard.bytes for shard in shards), unit="B", unit_scale=True, disable=None, mininterval=1
    ) as bar:
        results = map(check, shards) if workers == 1 else _in_processes(check, shards, workers)
        for shard, faults in zip(shards, results, strict=True):
            bar.update(shard.bytes)
            yield f"{shard.file}: {'; '.join(faults)}" if faults else ""


def _in_processes(check: Callable[[_Shard], list[str]], shards: list[_Shard], workers: int) -> Iterator[list[str]]:
    with ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"), initializer=end_with_parent) as pool:
        try:
            yield from pool.map(check, shards)
        except BrokenProcessPool:
            raise UserError(
                "a process that checks shards was killed (out of memory?); run the same command again"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _check_shard(
    folder: Path, shard: _Shard, *, views: list[str], vocab_size: int, special_ids: frozenset[int]
) -> list[str]:
    """Return the faults of one shard. Its structure is checked even if its size or SHA-256 is wrong."""
    path = folder / shard.file
    try:
        size = path.stat().st_size
        faults = [f"it has {size:,} bytes instead of {shard.bytes:,}"] if size != shard.bytes else []
        if not faults and sha256_file(path) != shard.sha256:
            faults.append("its SHA-256 does not match the manifest")
        with pa.memory_map(str(path)) as file:
            return faults + _content_faults(file, shard, views, vocab_size, special_ids)
    except FileNotFoundError:
        return ["it is missing"]
    except OSError as error:
        return [f"it cannot be read ({error.strerror or error})"]


def _content_faults(
    file: pa.MemoryMappedFile, shard: _Shard, views: list[str], vocab_size: int, special_ids: frozenset[int]
) -> list[str]:
    """Return the faults of the content of a shard."""
    dtype = pa.uint16() if vocab_size <= 2**16 else pa.uint32()
    expected = [*((view, pa.list_(dtype)) for view in views), (CONTINUES, pa.bool_()), (CHECKSUM, pa.uint32())]
    try:
        reader = pa.ipc.open_file(file)
        if reader.num_record_batches != 1:
            return [f"it has {reader.num_record_batches} record batches instead of one"]
        batch = reader.get_batch(0)
        batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        return [f"its Arrow structure is corrupt ({' '.join(str(error).split())[:100]})"]
    columns = [(field.name, field.type) for field in batch.schema]
    if columns != expected:
        return [f"its columns are {_described(columns)} instead of {_described(expected)}"]
    if (
        batch.column(CONTINUES).null_count
        or batch.column(CHECKSUM).null_count
        or any(batch.column(view).values.null_count for view in views)
    ):
        return ["it has nulls in place of tokens, checksums or flags"]
    if not batch.num_rows:
        return ["it has no records"]
    return _row_faults(batch, shard, views, vocab_size, special_ids)


def _described(columns: list[tuple[str, pa.DataType]]) -> str:
    return ", ".join(f"{name}: {kind}" for name, kind in columns)


def _row_faults(
    batch: pa.RecordBatch, shard: _Shard, views: list[str], vocab_size: int, special_ids: frozenset[int]
) -> list[str]:
    """Return the faults of the records of a shard and of their counts in the manifest."""
    lengths = np.stack([np.diff(batch.column(view).offsets.to_numpy()) for view in views], axis=1).astype(np.int64)
    present = np.stack([batch.column(view).is_valid().to_numpy(zero_copy_only=False) for view in views], axis=1)
    continues: np.ndarray = batch.column(CONTINUES).to_numpy(zero_copy_only=False)
    next_differs = np.append((present[:-1] != present[1:]).any(axis=1), True)
    faults: dict[str, np.ndarray] = {
        "no view has a token": np.array(~present.any(axis=1)),
        **{f"{view} is empty, but not null": present[:, v] & (lengths[:, v] == 0) for v, view in enumerate(views)},
        **{f"{view} is null, but has tokens": ~present[:, v] & (lengths[:, v] > 0) for v, view in enumerate(views)},
        "it continues in the next record, but that has other views": continues & next_differs,
    }
    for view in views:
        for token_fault in ("an id beyond the vocabulary", "a special token"):
            faults[f"{view} has {token_fault}"] = np.zeros(len(lengths), bool)
    faults["its checksum does not match its tokens"] = wrong = np.zeros(len(lengths), bool)
    stored = batch.column(CHECKSUM).to_numpy()
    columns = [
        (batch.column(view).values.to_numpy(), batch.column(view).offsets.to_numpy().astype(np.int64)) for view in views
    ]
    for first, stop in _blocks(lengths.sum(axis=1)):
        hashes = np.empty((stop - first, len(views)), np.uint64)
        for v, (values, offsets) in enumerate(columns):
            tokens, view_lengths = values[offsets[first] : offsets[stop]], lengths[first:stop, v]
            for fault, bad in (
                (f"{views[v]} has an id beyond the vocabulary", tokens >= vocab_size),
                (f"{views[v]} has a special token", np.isin(tokens, list(special_ids))),
            ):
                if bad.any():
                    faults[fault][first + np.repeat(np.arange(stop - first), view_lengths)[bad]] = True
            hashes[:, v] = view_hashes(tokens, view_lengths)
        continuation_tokens = _continuation_tokens(columns, lengths, continues, first, stop)
        wrong[first:stop] = record_checksums(hashes, lengths[first:stop], continuation_tokens) != stored[first:stop]
    return [*_describe(faults), *_count_faults(shard, views, lengths, continues)]


def _blocks(tokens: np.ndarray) -> Iterator[tuple[int, int]]:
    """Return runs [first, stop) of records with about BLOCK_TOKENS tokens each, from the records' tokens (N,)."""
    block = np.cumsum(tokens) // BLOCK_TOKENS
    bounds = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(tokens)]
    return itertools.pairwise(bounds)


def _continuation_tokens(
    columns: list[tuple[np.ndarray, np.ndarray]], lengths: np.ndarray, continues: np.ndarray, first: int, stop: int
) -> np.ndarray:
    """Return the first token of the next record for each record in [first, stop) that continues there, else -1."""
    continuation_tokens = np.full(stop - first, -1)
    continued = np.flatnonzero(continues[first : min(stop, len(lengths) - 1)])
    for view, (values, offsets) in reversed(list(enumerate(columns))):
        present = continued[lengths[first + continued + 1, view] > 0]
        continuation_tokens[present] = values[offsets[first + present + 1]]
    return continuation_tokens


def _describe(faults: dict[str, np.ndarray]) -> Iterator[str]:
    """Yield a description of each fault with the first affected record. `faults` has a mask (N,) for each fault."""
    for fault, rows in faults.items():
        if rows.any():
            others = f" (and {rows.sum() - 1:,} others)" if rows.sum() > 1 else ""
            yield f"row {int(np.argmax(rows))}, counted from 0{others}: {fault}"


def _count_faults(shard: _Shard, views: list[str], lengths: np.ndarray, continues: np.ndarray) -> Iterator[str]:
    """Yield the counts that differ from the manifest, from lengths (N, views) and `continues` (N,)."""
    pieces = continues | np.append(False, continues[:-1])
    complete = lengths[~pieces & (lengths > 0).any(axis=1)]
    counts = {
        "records": len(lengths),
        "incomplete": int((lengths == 0).any(axis=1).sum()),
        "continued": int(continues.sum()),
        "tokens": dict(zip(views, lengths.sum(axis=0).tolist(), strict=True)),
        "longest": dict(zip(views, lengths.max(axis=0).tolist(), strict=True)),
        "positions_needed": int(positions_needed(complete).max(initial=0)),
    }
    for key, value in counts.items():
        if getattr(shard, key) != value:
            yield f"it has {key} {value} instead of {getattr(shard, key)}"
