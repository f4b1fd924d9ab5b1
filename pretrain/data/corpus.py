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
from data_prep.console import UserError
from data_prep.files import read_json_or_none
from data_prep.shards import RecordTokens, ShardRows, open_shard, read_manifest, read_rows, row_lengths
from data_prep.tokenizer import Tokenizer

OPEN_SHARDS = 256
"""Kept mapped at a time: a process may have 65,530 maps and, while one is made, 1,024 open files. A window of the order reads about 64."""


class SourceRecords(NamedTuple):
    """A source of the split: its records are those from `first` on."""

    number: int
    """Its place in data.sources."""
    first: int
    records: int


class Corpus:
    """The records 0 to `len(corpus)` of one split, in the order of the shards.

    The views of a record are counted among those that it has: view 1 is its second, whichever of `data.views` that is.

    Opening reads the manifest and the tokenizer alone. Shards are mapped when they are needed, and each record is verified when its
    lengths or tokens are read; a UserError names what does not fit.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if split not in self.manifest["splits"]:
            raise UserError(
                f"the corpus {folder} has no {split} split (it has {', '.join(self.manifest['splits'])}); "
                f"add a source with split: {split}"
                + (" or set data.validation_fraction" if split == "validation" else "")
            )
        entry = self.manifest["splits"][split]
        self.tokenizer = Tokenizer.load(self.folder / "tokenizer")
        if self.tokenizer.fingerprint != self.manifest["tokenizer"]["sha256"]:
            raise UserError(
                f"{self.folder / 'tokenizer'} is not the tokenizer that the shards were made with; "
                f"remove the folder {folder} and prepare the corpus again"
            )
        self.entry = entry
        """What the manifest says of the split."""
        self.longest = np.array([[entry["longest"][view] for view in self.manifest["views"]]])
        """Bounds on the tokens of each view, (1, views)."""
        self._complete = entry["incomplete"] == 0
        self._first = np.cumsum([0] + [shard["records"] for shard in entry["shards"]])
        where, shards, views = self.folder, entry["shards"], self.manifest["views"]
        self._shard = lru_cache(OPEN_SHARDS)(lambda number: open_shard(where, shards[number], views))

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def views(self) -> int:
        """Number of views of a record."""
        return len(self.manifest["views"])

    @property
    def sources(self) -> list[SourceRecords]:
        """The sources of the split, in their order."""
        numbers = np.array([shard["source"] for shard in self.entry["shards"]])
        begins = np.flatnonzero(np.diff(numbers, prepend=-1))
        bounds = self._first[[*begins, len(numbers)]].tolist()
        return [
            SourceRecords(int(numbers[begin]), first, stop - first)
            for begin, first, stop in zip(begins, bounds[:-1], bounds[1:], strict=True)
        ]

    def lengths(self, records: np.ndarray) -> np.ndarray:
        """Tokens of each view: record numbers (N,) -> (N, views); 0 behind the last that a record has."""
        if not len(records):
            return np.zeros((0, self.views), np.int64)
        order, parts = self._parts(records)
        lengths = np.empty((len(records), self.views), np.int64)
        lengths[order] = row_lengths(parts)
        return lengths if self._complete else np.take_along_axis(lengths, _present_first(lengths), axis=1)

    def read(self, records: np.ndarray) -> RecordTokens:
        """The tokens of records (N,), verified. Views are counted among those that each has."""
        if not len(records):
            none = np.zeros((0, self.views), np.int64)
            return RecordTokens(np.zeros(0, np.uint16), none, none, none.astype(np.uint64), none[:, 0])
        order, parts = self._parts(records)
        found = read_rows(parts)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        rows = back[:, None]
        columns = np.arange(self.views) if self._complete else _present_first(found.lengths)[back]
        starts, lengths, hashes = (values[rows, columns] for values in (found.starts, found.lengths, found.hashes))
        return RecordTokens(found.tokens, starts, lengths, hashes, found.continuation_tokens[back])

    def tokens(self, records: np.ndarray, view: int) -> np.ndarray:
        """The tokens of one view of the records (N,), concatenated in their order."""
        return self.read(records).view(view)

    def tokens_by_view(self, record: int) -> dict[str, np.ndarray]:
        """The token ids of one record by the names of data.views, none for a view that it lacks."""
        contents = read_rows(self._parts(np.array([record]))[1])
        return {view: contents.view(number) for number, view in enumerate(self.manifest["views"])}

    def _parts(self, records: np.ndarray) -> tuple[np.ndarray, ShardRows]:
        """The records in the order of their shards, (N,) indices, and their rows by shard."""
        shard_of = np.searchsorted(self._first, records, side="right") - 1
        order = np.argsort(shard_of, kind="stable")
        ordered = shard_of[order]
        begins = np.flatnonzero(np.diff(ordered, prepend=-1))
        rows = np.split(records[order] - self._first[ordered], begins[1:])
        return order, [
            (self._shard(number), of_shard) for number, of_shard in zip(ordered[begins].tolist(), rows, strict=True)
        ]


def source_weights(manifest: dict[str, Any], sources: Sequence[Source] = ()) -> list[float]:
    """How often a record of each source comes in an epoch: as data.sources of the run say or, without any, as the corpus was prepared.

    Raises UserError where the run has other sources. One whose path is left open is the corpus' own.
    """
    prepared = [source["weight"] for source in manifest["sources"]]
    if sources and len(sources) != len(prepared):
        raise UserError(
            f"data.sources are {len(sources)}, but the corpus was prepared from {len(prepared)}: name those, or none, "
            "or prepare another data.path"
        )
    if not sources:
        return prepared
    for number, (source, before) in enumerate(zip(sources, manifest["settings"]["data"]["sources"], strict=True)):
        now = {key: getattr(source, key) for key in ("type", "split", "path") if getattr(source, key, None) is not None}
        if differing := [f"{key} {before.get(key)}" for key in now if now[key] != before.get(key)]:
            raise UserError(
                f"data.sources.{number} is {' '.join(now.values())}, but the corpus was prepared with {' and '.join(differing)} there: "
                "name those, or none, or prepare another data.path"
            )
    return [source.weight for source in sources]


def corpus_identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what distinguishes a corpus from any other: the checksum of each split's shards, and of the tokenizer.

    The examples of unknown tokens do not count: they name the files that the corpus was made from, and earlier versions had none.
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
    """Whether a run was trained on the corpus of a manifest, as far as its environment.json says what it was trained on."""
    recorded = (read_json_or_none(run_dir / "environment.json") or {}).get("data", {})
    return all(recorded.get(part, found) == found for part, found in corpus_identity(manifest).items())


WRITTEN_OUT = {"data.tokenizer.model_type": "bpe", "data.near_threshold": 0.8}
"""Defaults of keys of the data section that are only filled in when the corpus is prepared."""
NOT_COMPARED = ("sequence_length", "decontaminate")
"""Keys of the data section that may differ from those of the preparation: the start of a run checks what follows from them."""


def check_data_section(data: DataConfig, manifest: dict[str, Any]) -> None:
    """Raise UserError for a key of the data section with another value than the corpus was prepared with.

    A key without a value (no sources, a source without a path) says nothing that could differ.
    """
    now = data.shard_settings()
    if not data.sources:
        del now["sources"]
    for key, prepared, given in _differing(manifest["settings"]["data"], now, "data"):
        if key.removeprefix("data.") not in NOT_COMPARED:
            raise UserError(
                f"{key} is {given}, but {data.path} was prepared with {prepared}: set it so, or prepare another data.path with "
                "this configuration: python -m data_prep CONFIG data.path=FOLDER"
            )


def _differing(prepared: Any, now: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield key, prepared and present value of each difference in what both have."""
    if (
        isinstance(prepared, dict) and isinstance(now, dict) and not key.endswith(".views")
    ):  # there, a key that is absent is a view that is
        for part in prepared:
            if part in now:
                yield from _differing(prepared[part], now[part], f"{key}.{part}")
    elif isinstance(prepared, list) and isinstance(now, list) and len(prepared) == len(now):
        for number, (one, other) in enumerate(zip(prepared, now, strict=True)):
            yield from _differing(one, other, f"{key}.{number}")
    elif not _mean_the_same(key, prepared, now):
        yield key, prepared, now


def _mean_the_same(key: str, prepared: Any, now: Any) -> bool:
    if key.endswith(".path"):
        return now is None or (isinstance(prepared, str) and os.path.abspath(prepared) == os.path.abspath(now))
    default = WRITTEN_OUT.get(key)
    return bool((default if prepared is None else prepared) == (default if now is None else now))


def _present_first(lengths: np.ndarray) -> np.ndarray:
    """The columns of each record, those that hold tokens first: (N, views) -> (N, views)."""
    return np.argsort(lengths == 0, axis=1, kind="stable")
