"""A split of a prepared corpus, memory-mapped and addressed by record number."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.config import DataConfig, Source
from data_prep.layout import present_first
from data_prep.shards import RecordTokens, ShardRows, open_shard, read_manifest, read_rows, row_lengths, view_hashes
from data_prep.tokenizer import Tokenizer
from data_prep.utils.console import UserError
from data_prep.utils.files import read_json_or_none

OPEN_SHARDS = 256
"""Maximum number of shards mapped at a time.

A process may have 65,530 memory maps, and 1,024 open files while it maps a shard. A window of the order reads about 64
shards.
"""

READ_AT_A_TIME = 65_536
"""Number of records that are read at a time when a whole split is read."""


class SourceRecords(NamedTuple):
    """A source of the split: its records are numbered consecutively from `first`."""

    number: int
    """Index in data.sources."""
    first: int
    records: int


class Corpus:
    """The records 0 to `len(corpus) - 1` of one split, in the order of the shards.

    Only the views that a record has are numbered: view 1 is its second view, whichever of `data.views` that is.

    Opening a corpus reads only the manifest and the tokenizer. Shards are mapped when they are needed. Each record is
    verified when its lengths or tokens are read; a UserError names what is corrupt.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if split not in self.manifest["splits"]:
            raise UserError(
                f"the corpus {folder} has no {split} split (its splits: {', '.join(self.manifest['splits'])}); "
                f"add a source with split: {split}"
                + (" or set data.validation_fraction" if split == "validation" else "")
            )
        entry = self.manifest["splits"][split]
        self.tokenizer = Tokenizer.load(self.folder / "tokenizer")
        if self.tokenizer.fingerprint != self.manifest["tokenizer"]["sha256"]:
            raise UserError(
                f"{self.folder / 'tokenizer'} is not the tokenizer that was used to make the shards; "
                f"remove the folder {folder} and prepare the corpus again"
            )
        self.entry = entry
        """Entry of the split in the manifest."""
        self.longest = np.array([[entry["longest"][view] for view in self.manifest["views"]]])
        """Upper bounds on the number of tokens of each view, (1, views)."""
        self._complete = entry["incomplete"] == 0
        self._first = np.cumsum([0] + [shard["records"] for shard in entry["shards"]])
        corpus_folder, shards, views = self.folder, entry["shards"], self.manifest["views"]
        self._shard = lru_cache(OPEN_SHARDS)(lambda number: open_shard(corpus_folder, shards[number], views))

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def views(self) -> int:
        """Number of views of a record."""
        return len(self.manifest["views"])

    @property
    def sources(self) -> list[SourceRecords]:
        """Sources of the split, in order."""
        numbers = np.array([shard["source"] for shard in self.entry["shards"]])
        begins = np.flatnonzero(np.diff(numbers, prepend=-1))
        bounds = self._first[[*begins, len(numbers)]].tolist()
        return [
            SourceRecords(int(numbers[begin]), first, stop - first)
            for begin, first, stop in zip(begins, bounds[:-1], bounds[1:], strict=True)
        ]

    def lengths(self, records: np.ndarray) -> np.ndarray:
        """Return the number of tokens of each view: record numbers (N,) -> (N, views); 0 after a record's last view."""
        if not len(records):
            return np.zeros((0, self.views), np.int64)
        order, parts = self._parts(records)
        lengths = np.empty((len(records), self.views), np.int64)
        lengths[order] = row_lengths(parts)
        return lengths if self._complete else np.take_along_axis(lengths, present_first(lengths), axis=1)

    def read(self, records: np.ndarray) -> RecordTokens:
        """Return the verified tokens of records (N,). Only the views that a record has are numbered."""
        if not len(records):
            none = np.zeros((0, self.views), np.int64)
            return RecordTokens(np.zeros(0, np.uint16), none, none, none.astype(np.uint64), none[:, 0])
        order, parts = self._parts(records)
        found = read_rows(parts)
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        rows = inverse[:, None]
        columns = np.arange(self.views) if self._complete else present_first(found.lengths)[inverse]
        starts, lengths, hashes = (values[rows, columns] for values in (found.starts, found.lengths, found.hashes))
        return RecordTokens(found.tokens, starts, lengths, hashes, found.continuation_tokens[inverse])

    def tokens(self, records: np.ndarray, view: int) -> np.ndarray:
        """Return the tokens of one view of the records (N,), concatenated in the order of `records`."""
        return self.read(records).view(view)

    def tokens_by_view(self, record: int) -> dict[str, np.ndarray]:
        """Return the token ids of one record by the names of data.views; a missing view has an empty array."""
        contents = read_rows(self._parts(np.array([record]))[1])
        return {view: contents.view(number) for number, view in enumerate(self.manifest["views"])}

    def all_hashes(self) -> Iterator[np.ndarray]:
        """Yield the hashes of the views of all records, in blocks (N, views)."""
        for first in range(0, len(self), READ_AT_A_TIME):
            yield self.read(np.arange(first, min(first + READ_AT_A_TIME, len(self)))).hashes

    def text_hashes(self, texts: Sequence[str]) -> np.ndarray:
        """Return the hash that a view with each text would have, (texts,)."""
        encoded = self.tokenizer.encode_batch(list(texts))
        tokens = np.array([token for ids in encoded for token in ids], np.uint32)
        return view_hashes(tokens, np.array([len(ids) for ids in encoded], np.int64))

    def _parts(self, records: np.ndarray) -> tuple[np.ndarray, ShardRows]:
        """Return the indices (N,) that sort the records by shard, and the rows to read from each shard."""
        shard_of = np.searchsorted(self._first, records, side="right") - 1
        order = np.argsort(shard_of, kind="stable")
        ordered = shard_of[order]
        begins = np.flatnonzero(np.diff(ordered, prepend=-1))
        rows = np.split(records[order] - self._first[ordered], begins[1:])
        return order, [
            (self._shard(number), shard_rows) for number, shard_rows in zip(ordered[begins].tolist(), rows, strict=True)
        ]


def source_weights(manifest: dict[str, Any], sources: Sequence[Source] = ()) -> list[float]:
    """Return how often a record of each source occurs in an epoch.

    The weights come from data.sources of the run, or from the manifest if the run lists no sources. Raises UserError if
    the run's sources differ from the sources of the corpus. A source without a path counts as equal.
    """
    prepared = [source["weight"] for source in manifest["sources"]]
    if sources and len(sources) != len(prepared):
        raise UserError(
            f"data.sources has length {len(sources)}, but the corpus was prepared from {len(prepared)} sources: "
            "list the same sources, or none, or prepare a different data.path"
        )
    if not sources:
        return prepared
    for number, (source, before) in enumerate(zip(sources, manifest["settings"]["data"]["sources"], strict=True)):
        now = {key: getattr(source, key) for key in ("type", "split", "path") if getattr(source, key, None) is not None}
        if differing := [f"{key} {before.get(key)}" for key in now if now[key] != before.get(key)]:
            raise UserError(
                f"data.sources.{number} is {' '.join(now.values())}, but the corpus was prepared with "
                f"{' and '.join(differing)} there: list the same sources, or none, or prepare a different data.path"
            )
    return [source.weight for source in sources]


def corpus_identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the identity of a corpus: the checksums of each split's shards and of the tokenizer.

    The examples of unknown tokens are ignored: they contain the names of the source files, and earlier versions did not
    record them.
    """
    shards = {
        split: {key: value for key, value in entry.items() if key != "unknown"}
        for split, entry in manifest["splits"].items()
    }
    splits = {
        split: {
            "records": entry["records"],
            "sha256": hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest(),
        }
        for split, entry in shards.items()
    }
    return {"corpus": splits, "tokenizer": manifest["tokenizer"]}


def was_trained_on(run_dir: Path, manifest: dict[str, Any]) -> bool:
    """Return whether a run was trained on the corpus of a manifest.

    Only values that the run's environment.json records are compared.
    """
    recorded = (read_json_or_none(run_dir / "environment.json") or {}).get("data", {})
    return all(recorded.get(part, value) == value for part, value in corpus_identity(manifest).items())


PREPARED_DEFAULTS = {"data.tokenizer.model_type": "bpe", "data.near_threshold": 0.8}
"""Defaults of unset keys of the data section that are filled in when a corpus is prepared."""
NOT_COMPARED = ("sequence_length", "decontaminate")
"""Keys of the data section whose values may differ from the prepared ones; a run checks the consequences at startup."""


def check_data_section(data: DataConfig, manifest: dict[str, Any]) -> None:
    """Raise UserError if a key of the data section differs from the value that the corpus was prepared with.

    Keys without a value (no sources, a source without a path) are not compared.
    """
    now = data.shard_settings()
    if not data.sources:
        del now["sources"]
    for key, prepared, given in _differing(manifest["settings"]["data"], now, "data"):
        if key.removeprefix("data.") not in NOT_COMPARED:
            raise UserError(
                f"{key} is {given}, but {data.path} was prepared with {prepared}: set it to that value, or prepare "
                "a different data.path with this configuration: python -m data_prep CONFIG data.path=FOLDER"
            )


def _differing(prepared: Any, now: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the key, the prepared value and the present value for each shared key whose values differ."""
    # Under .views, an absent key is an absent view, so the dictionaries are compared as wholes.
    if isinstance(prepared, dict) and isinstance(now, dict) and not key.endswith(".views"):
        for part in prepared:
            if part in now:
                yield from _differing(prepared[part], now[part], f"{key}.{part}")
    elif isinstance(prepared, list) and isinstance(now, list) and len(prepared) == len(now):
        for number, (prepared_item, item) in enumerate(zip(prepared, now, strict=True)):
            yield from _differing(prepared_item, item, f"{key}.{number}")
    elif not _is_equivalent(key, prepared, now):
        yield key, prepared, now


def _is_equivalent(key: str, prepared: Any, now: Any) -> bool:
    if key.endswith(".path"):
        return now is None or (isinstance(prepared, str) and os.path.abspath(prepared) == os.path.abspath(now))
    default = PREPARED_DEFAULTS.get(key)
    return bool((default if prepared is None else prepared) == (default if now is None else now))


def count_in_corpus(corpus: Corpus, texts: Sequence[str]) -> list[int]:
    """Return for each text the number of views of records in a split of a corpus that have the same tokens."""
    text_hashes, inverse = np.unique(corpus.text_hashes(texts), return_inverse=True)
    counts = np.zeros(len(text_hashes), np.int64)
    for hashes in corpus.all_hashes():
        found = hashes[np.isin(hashes, text_hashes)]
        counts += np.bincount(np.searchsorted(text_hashes, found), minlength=len(counts))
    return [int(count) for count in counts[inverse]]
