"""Whether a prepared corpus is what its manifest says, shard by shard, in several processes and bounded memory."""

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
from data_prep.config_file import validate
from data_prep.console import UserError
from data_prep.executor import end_with_parent
from data_prep.files import sha256_file
from data_prep.shards import MANIFEST, positions_needed, read_manifest, record_checksums, view_hashes
from data_prep.tokenizer import Tokenizer

BLOCK_TOKENS = 2**21
"""Tokens of a shard that are looked at together."""
Count = Field(ge=0, strict=True)
"""A number in the manifest that counts something."""


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


def verify(folder: Path, say: Callable[[str], None], workers: int | None = None) -> None:
    """Look at every shard of a prepared corpus; say what is wrong, a line a shard, or that all is sound.

    Runs in `workers` processes, by default one a core. Raises UserError where anything is wrong.
    """
    values = read_manifest(folder)
    try:
        manifest = validate(_Manifest, values)
    except UserError as error:
        raise UserError(f"{folder / MANIFEST} is damaged: {error}; {_remedy(folder)}") from None
    problems = [*_in_manifest(manifest), *_in_folder(folder, manifest)]
    special_ids: frozenset[int] = frozenset()
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer")
        special_ids = tokenizer.special_ids
        if (tokenizer.fingerprint, tokenizer.vocab_size) != (manifest.tokenizer.sha256, manifest.tokenizer.vocab_size):
            problems.append("tokenizer: it is not the one that the shards were made with")
    except UserError as error:
        problems.append(f"tokenizer: {error}")
    for problem in problems:
        say(problem)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    damaged = 0
    for found in _look_at_shards(folder, manifest, shards, special_ids, workers):
        damaged += bool(found)
        if found:
            say(found)
    if damaged or problems:
        raise UserError(
            f"{folder} is not sound: {damaged:,} of {len(shards):,} shards are damaged"
            + f", and {len(problems):,} other faults" * bool(problems)
            + f", named above; {_remedy(folder)}"
        )
    records = sum(split.records for split in manifest.splits.values())
    tokens = sum(sum(split.tokens.values()) for split in manifest.splits.values())
    say(f"{len(shards):,} shards, {records:,} records, {tokens:,} tokens: all sound")


def _remedy(folder: Path) -> str:
    return f"copy them anew from where they are sound, or remove the folder {folder} and prepare the corpus again"


def _in_manifest(manifest: _Manifest) -> Iterator[str]:
    """What does not fit together within the manifest."""
    files: set[str] = set()
    by_source = [0] * len(manifest.sources)
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        if shard.source >= len(by_source):
            yield f"{MANIFEST}: {shard.file} is of source {shard.source}, of {len(by_source)}"
        else:
            by_source[shard.source] += sum(shard.tokens.values())
    for number, tokens in enumerate(by_source):
        yield from _differs(f"{MANIFEST}: sources.{number}.tokens", manifest.sources[number].tokens, tokens)
    for name, split in manifest.splits.items():
        where = f"{MANIFEST}: splits.{name}"
        for shard in split.shards:
            if shard.file in files:
                yield f"{where}: the shard {shard.file} is listed twice"
            files.add(shard.file)
            if not set(shard.tokens) == set(shard.longest) == set(manifest.views):
                yield f"{where}: {shard.file} has views {sorted({*shard.tokens, *shard.longest})}, the corpus {sorted(manifest.views)}"
        places = [(shard.source, [int(part) for part in re.findall(r"\d+", shard.file)]) for shard in split.shards]
        if places != sorted(places):
            yield f"{where}.shards: they do not stand in the order in which they were written, by source and file"
        for key, combine in (("records", sum), ("incomplete", sum), ("continued", sum), ("positions_needed", max)):
            yield from _differs(
                f"{where}.{key}", getattr(split, key), combine(getattr(shard, key) for shard in split.shards)
            )
        for key, combine in (("tokens", sum), ("longest", max)):
            total = {
                view: combine(getattr(shard, key).get(view, 0) for shard in split.shards) for view in manifest.views
            }
            yield from _differs(f"{where}.{key}", getattr(split, key), total)


def _differs(where: str, stated: Any, found: Any) -> Iterator[str]:
    if stated != found:
        yield f"{where} is {stated}, its shards have {found}"


def _in_folder(folder: Path, manifest: _Manifest) -> Iterator[str]:
    """Files that should not be there."""
    listed = {shard.file for split in manifest.splits.values() for shard in split.shards}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".arrow" and path.name not in listed:
            yield f"{path.name}: the manifest does not list this shard"
        elif path.suffix == ".tmp" or path.name == ".partial":
            yield f"{path.name}: left over by an interrupted preparation; the same preparation, started again, removes it"


def _look_at_shards(
    folder: Path, manifest: _Manifest, shards: list[_Shard], special_ids: frozenset[int], workers: int | None
) -> Iterator[str]:
    """What is wrong with each shard, in one line, in their order; empty for a sound one."""
    look = partial(
        _look_at, folder, views=manifest.views, vocab_size=manifest.tokenizer.vocab_size, special_ids=special_ids
    )
    workers = min(workers or len(os.sched_getaffinity(0)), len(shards))
    with tqdm(
        total=sum(shard.bytes for shard in shards), unit="B", unit_scale=True, disable=None, mininterval=1
    ) as bar:
        for shard, found in zip(
            shards, map(look, shards) if workers == 1 else _in_processes(look, shards, workers), strict=True
        ):
            bar.update(shard.bytes)
            yield f"{shard.file}: {'; '.join(found)}" if found else ""


def _in_processes(look: Callable[[_Shard], list[str]], shards: list[_Shard], workers: int) -> Iterator[list[str]]:
    with ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"), initializer=end_with_parent) as pool:
        try:
            yield from pool.map(look, shards)
        except BrokenProcessPool:
            raise UserError(
                "a process that looks at shards was killed (out of memory?); start the same command again"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _look_at(
    folder: Path, shard: _Shard, *, views: list[str], vocab_size: int, special_ids: frozenset[int]
) -> list[str]:
    """What is wrong with one shard; where its bytes are not those that were written, as much as can be told from within."""
    path = folder / shard.file
    try:
        size = path.stat().st_size
        found = [f"it has {size:,} bytes, the manifest says {shard.bytes:,}"] if size != shard.bytes else []
        if not found and sha256_file(path) != shard.sha256:
            found.append("its SHA-256 is not the manifest's")
        with pa.memory_map(str(path)) as file:
            return found + _within(file, shard, views, vocab_size, special_ids)
    except FileNotFoundError:
        return ["it is missing"]
    except OSError as error:
        return [f"it cannot be read ({error.strerror or error})"]


def _within(
    file: pa.MemoryMappedFile, shard: _Shard, views: list[str], vocab_size: int, special_ids: frozenset[int]
) -> list[str]:
    """What is wrong inside a shard."""
    dtype = pa.uint16() if vocab_size <= 2**16 else pa.uint32()
    wanted = [*((view, pa.list_(dtype)) for view in views), (CONTINUES, pa.bool_()), (CHECKSUM, pa.uint32())]
    try:
        reader = pa.ipc.open_file(file)
        if reader.num_record_batches != 1:
            return [f"it has {reader.num_record_batches} record batches instead of one"]
        batch = reader.get_batch(0)
        batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        return [f"its Arrow structure is damaged ({' '.join(str(error).split())[:100]})"]
    columns = [(field.name, field.type) for field in batch.schema]
    if columns != wanted:
        return [f"its columns are {_described(columns)}; they should be {_described(wanted)}"]
    if (
        batch.column(CONTINUES).null_count
        or batch.column(CHECKSUM).null_count
        or any(batch.column(view).values.null_count for view in views)
    ):
        return ["it has nulls in place of tokens, checksums or flags"]
    if not batch.num_rows:
        return ["it holds no record"]
    return _look_at_rows(batch, shard, views, vocab_size, special_ids)


def _described(columns: list[tuple[str, pa.DataType]]) -> str:
    return ", ".join(f"{name}: {kind}" for name, kind in columns)


def _look_at_rows(
    batch: pa.RecordBatch, shard: _Shard, views: list[str], vocab_size: int, special_ids: frozenset[int]
) -> list[str]:
    """Every record, and the counts of all."""
    lengths = np.stack([np.diff(batch.column(view).offsets.to_numpy()) for view in views], axis=1).astype(np.int64)
    present = np.stack([batch.column(view).is_valid().to_numpy(zero_copy_only=False) for view in views], axis=1)
    continues: np.ndarray = batch.column(CONTINUES).to_numpy(zero_copy_only=False)
    faults: dict[str, np.ndarray] = {
        "no view holds a token": np.array(~present.any(axis=1)),
        **{f"{view} is empty, but not null": present[:, v] & (lengths[:, v] == 0) for v, view in enumerate(views)},
        **{f"{view} is null, but holds tokens": ~present[:, v] & (lengths[:, v] > 0) for v, view in enumerate(views)},
        "it goes on in the next record, which is of other views": continues
        & np.append((present[:-1] != present[1:]).any(axis=1), True),
    }
    for name in (
        f"{view} holds {what}" for view in views for what in ("an id beyond the vocabulary", "a special token")
    ):
        faults[name] = np.zeros(len(lengths), bool)
    faults["its checksum is not that of its tokens"] = wrong = np.zeros(len(lengths), bool)
    stored = batch.column(CHECKSUM).to_numpy()
    columns = [
        (batch.column(view).values.to_numpy(), batch.column(view).offsets.to_numpy().astype(np.int64)) for view in views
    ]
    for first, stop in _blocks(lengths.sum(axis=1)):
        hashes = np.empty((stop - first, len(views)), np.uint64)
        for v, (values, offsets) in enumerate(columns):
            tokens, within = values[offsets[first] : offsets[stop]], lengths[first:stop, v]
            for what, bad in (
                (f"{views[v]} holds an id beyond the vocabulary", tokens >= vocab_size),
                (f"{views[v]} holds a special token", np.isin(tokens, list(special_ids))),
            ):
                if bad.any():
                    faults[what][first + np.repeat(np.arange(stop - first), within)[bad]] = True
            hashes[:, v] = view_hashes(tokens, within)
        continuation_tokens = _closing(columns, lengths, continues, first, stop)
        wrong[first:stop] = record_checksums(hashes, lengths[first:stop], continuation_tokens) != stored[first:stop]
    return [*_told(faults), *_miscounted(shard, views, lengths, continues)]


def _blocks(tokens: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs [first, stop) of records with about BLOCK_TOKENS tokens each: (N,) tokens of the records."""
    block = np.cumsum(tokens) // BLOCK_TOKENS
    bounds = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(tokens)]
    return itertools.pairwise(bounds)


def _closing(
    columns: list[tuple[np.ndarray, np.ndarray]], lengths: np.ndarray, continues: np.ndarray, first: int, stop: int
) -> np.ndarray:
    """The first token of the next record where a record goes on in it, else -1, for records [first, stop)."""
    continuation_tokens = np.full(stop - first, -1)
    places = np.flatnonzero(continues[first : min(stop, len(lengths) - 1)])
    for view, (values, offsets) in reversed(list(enumerate(columns))):
        present = places[lengths[first + places + 1, view] > 0]
        continuation_tokens[present] = values[offsets[first + present + 1]]
    return continuation_tokens


def _told(faults: dict[str, np.ndarray]) -> Iterator[str]:
    """The faults that some records have, (N,) each, with the first of them."""
    for what, rows in faults.items():
        if rows.any():
            others = f" (and {rows.sum() - 1:,} others)" if rows.sum() > 1 else ""
            yield f"row {int(np.argmax(rows))}, counted from 0{others}: {what}"


def _miscounted(shard: _Shard, views: list[str], lengths: np.ndarray, continues: np.ndarray) -> Iterator[str]:
    """Where the manifest counts otherwise: (N, views), (N,)."""
    pieces = continues | np.append(False, continues[:-1])
    whole = lengths[~pieces & (lengths > 0).any(axis=1)]
    found = {
        "records": len(lengths),
        "incomplete": int((lengths == 0).any(axis=1).sum()),
        "continued": int(continues.sum()),
        "tokens": dict(zip(views, lengths.sum(axis=0).tolist(), strict=True)),
        "longest": dict(zip(views, lengths.max(axis=0).tolist(), strict=True)),
        "positions_needed": int(positions_needed(whole).max(initial=0)),
    }
    for key, value in found.items():
        if getattr(shard, key) != value:
            yield f"it has {key} {value}, the manifest says {getattr(shard, key)}"
