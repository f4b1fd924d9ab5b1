"""The second pass over a unit: its remaining records become tokens, and shards of them.

A pair that does not fit a row is dropped. A plain document that does not is cut into records that do: none of its tokens is lost, and
`continues` says of each but the last that the document goes on in the next. Leaves a shard per split and, last, a report below
`.partial/shards`.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.console import UserError
from data_prep.files import read_json, write_json
from data_prep.holdout import load_frequent_targets, split_function
from data_prep.ragged import ragged_ranges, ragged_sums
from data_prep.scan import BATCH_CHARACTERS, dropped_file, scan_report
from data_prep.selection import duplicates
from data_prep.selection.drops import MAX_EXAMPLES, DropCounter, excerpt
from data_prep.shards import positions_needed, write_shard
from data_prep.sources.record import Reader, Record
from data_prep.text_chunks import chunk_text
from data_prep.tokenizer import Tokenizer
from data_prep.units import Job, Unit, open_job, open_tokenizer, read_unit

SHARD_TOKENS = 1 << 25
"""With so many a shard is full: what a unit keeps in memory is bounded, however large a compressed file or a row group is."""
CLOSING = 2
"""Positions of a plain document besides its tokens: the first and the end token."""


def shard_report(job: Job, number: int) -> Path:
    """Where the report of a unit stands once its shards do."""
    return job.partial / "shards" / f"{number:06d}.json"


def duplicate_files(job: Job) -> dict[str, list[Path]]:
    """The files that list duplicates, by the reason for which they are dropped."""
    return {reason: sorted((job.partial / reason).glob("*.npy")) for reason in ("duplicate", "near_duplicate")}


def left_out(job: Job, number: int) -> dict[int, str]:
    """Ordinal -> reason of the records of a unit that are dropped; "" where the scan has counted them."""
    out = dict.fromkeys(np.load(dropped_file(job, number)).tolist(), "")
    for reason, files in duplicate_files(job).items():
        out |= {ordinal: reason for ordinal in duplicates.dropped(files, number).tolist() if ordinal not in out}
    return out


def kept_records(
    job: Job, reader: Reader, number: int, unit: Unit, drops: DropCounter | None = None
) -> Iterator[tuple[int, Record]]:
    """The records of a scanned unit that nothing speaks against, each with the number of its piece; duplicates are counted in `drops`.

    Raises UserError where the unit has other records than the scan saw.
    """
    out = left_out(job, number)
    ordinal = -1
    for ordinal, (piece, record) in enumerate(read_unit(reader, unit)):
        reason = out.get(ordinal)
        if reason is None and record.views is not None:
            yield piece, record
        elif reason and drops is not None:
            drops.add(reason, piece, record.position, excerpt(record.texts))
    if ordinal + 1 != read_json(scan_report(job, number))["records"]:
        raise UserError(f"{unit.pieces[0].path} changed while it was prepared; start again when nothing writes to it")


def encode_unit(serialized: str, number: int, unit: Unit) -> int:
    """Tokenize one unit and write its shards; the number of records that it keeps."""
    job, readers = open_job(serialized)
    encoder = _Encoder(job, number, unit, open_tokenizer(job.data.path))
    for piece, record in kept_records(job, readers[unit.source], number, unit, encoder.drops):
        encoder.add(piece, record)
    encoder.finish()
    write_json(
        shard_report(job, number),
        {
            "kept": encoder.kept,
            "dropped": encoder.drops.by_reason,
            "unknown": encoder.unknown,
            "shards": dict(sorted(encoder.shards.items())),
        },
    )
    return encoder.kept


class _Encoder:
    """The records of a unit that are tokenized together, and the tokens so far."""

    def __init__(self, job: Job, number: int, unit: Unit, tokenizer: Tokenizer):
        self.job, self.number, self.unit, self.tokenizer = job, number, unit, tokenizer
        self.drops = DropCounter()
        self.split_of = split_function(job.data, unit.source, load_frequent_targets(job, unit.source))
        self.batch: list[tuple[int, Record]] = []
        self.characters = self.kept = 0
        self.parts: dict[str, list[tuple[list[np.ndarray], np.ndarray, np.ndarray]]] = {}
        """Of each split: the tokens of each view, lengths (N, views) and `continues` (N,) of one batch after the other, since the last shard."""
        self.shards: dict[str, list[dict[str, Any]]] = {}
        """Manifest entries of the shards, by split."""
        self.unknown: dict[str, dict[str, Any]] = {}
        """For each split with unknown tokens: their number, the number of records with one, and the first of these records as in Drops."""

    def add(self, piece: int, record: Record) -> None:
        self.batch.append((piece, record))
        self.characters += sum(map(len, record.texts))
        if self.characters >= BATCH_CHARACTERS:
            self._encode()

    def _encode(self) -> None:
        if not self.batch:
            return
        columns = [
            self._tokens([record.texts[view] for _, record in self.batch]) for view in range(len(self.job.data.views))
        ]
        lengths = np.stack([lengths for _, lengths in columns], axis=1)
        fits = self._fitting(lengths)
        splits = np.array([self.split_of(record) for _, record in self.batch])
        for split in sorted(set(splits[fits])):
            members = np.flatnonzero(fits & (splits == split))
            self._count_unknown(str(split), members, columns)
            tokens = []
            for values, of_view in columns:
                starts = np.cumsum(of_view) - of_view
                tokens.append(values[ragged_ranges(starts[members], of_view[members])])
            parts = self.parts.setdefault(str(split), [])
            parts.append((tokens, *_cut(lengths[members], self.job.data.sequence_length)))
            self.kept += len(members)
            if sum(len(values) for tokens, *_ in parts for values in tokens) >= SHARD_TOKENS:
                self._write(str(split))
        self.batch, self.characters = [], 0

    def _tokens(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of some texts, concatenated, and how many each has; none where there is but blank."""
        parts = [chunk_text(text, self.tokenizer.encode_batch) if text and not text.isspace() else [] for text in texts]
        encoded = self.tokenizer.encode_batch([part for of_text in parts for part in of_text])
        of_part = np.fromiter(map(len, encoded), np.int64, len(encoded))
        values = np.fromiter(itertools.chain.from_iterable(encoded), np.uint32, int(of_part.sum()))
        text_of = np.repeat(np.arange(len(texts)), [len(of_text) for of_text in parts])
        return values, np.bincount(text_of, of_part, minlength=len(texts)).astype(np.int64)

    def _count_unknown(self, split: str, members: np.ndarray, columns: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Count unknown tokens, which replace text that the tokenizer does not know; `columns` are the tokens and lengths of each view."""
        if self.tokenizer.unknown_id is None:
            return
        of_record = sum(
            ragged_sums((values == self.tokenizer.unknown_id).astype(np.int64), lengths)[members]
            for values, lengths in columns
        )
        having = members[np.flatnonzero(of_record)]
        if not len(having):
            return
        entry = self.unknown.setdefault(split, {"tokens": 0, "records": 0, "first": []})
        entry["tokens"] += int(np.sum(of_record))
        entry["records"] += len(having)
        for row in having[: MAX_EXAMPLES - len(entry["first"])]:
            piece, record = self.batch[row]
            entry["first"].append([piece, record.position, self._unknown_word(record.texts)])

    def _unknown_word(self, texts: tuple[str, ...]) -> str:
        """Return the first word with an unknown token as an example; the beginning of the record if no word has one by itself."""
        words = " ".join(texts).split()
        found = (
            word
            for word, ids in zip(words, self.tokenizer.encode_batch(words), strict=True)
            if self.tokenizer.unknown_id in ids
        )
        return excerpt((next(found, None) or " ".join(words),))

    def _fitting(self, lengths: np.ndarray) -> np.ndarray:
        """Which records are kept: (N, views) -> (N,). The others are counted."""
        views = (lengths > 0).sum(axis=1)
        needed = positions_needed(lengths)
        fits: np.ndarray = (views == 1) | ((views > 1) & (needed <= self.job.data.sequence_length))
        for row in np.flatnonzero(~fits):
            piece, record = self.batch[row]
            if views[row]:
                self.drops.add(
                    "too_long",
                    piece,
                    record.position,
                    f"needs data.sequence_length={needed[row]}: {excerpt(record.texts)}",
                )
            else:
                self.drops.add(
                    "empty", piece, record.position, f"the tokenizer leaves nothing of {excerpt(record.texts)}"
                )
        return fits

    def finish(self) -> None:
        """Write what is left."""
        self._encode()
        for split in sorted(self.parts):
            self._write(split)

    def _write(self, split: str) -> None:
        """Make a shard of what was encoded of a split."""
        tokens, lengths, continues = zip(*self.parts.pop(split), strict=True)
        together = np.concatenate(lengths)
        views = {
            name: (np.concatenate([part[view] for part in tokens]), together[:, view])
            for view, name in enumerate(self.job.data.views)
        }
        shards = self.shards.setdefault(split, [])
        path = Path(self.job.data.path) / f"{split}-{self.number:05d}{f'.{len(shards):03d}' if shards else ''}.arrow"
        shards.append(write_shard(path, self.unit.source, views, np.concatenate(continues), self.tokenizer.vocab_size))


def _cut(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Plain documents that exceed a row, as several records: (N, views) -> lengths (M, views), and whether each goes on (M,)."""
    room = sequence_length - CLOSING
    total = lengths.sum(axis=1)
    plain = (lengths > 0).sum(axis=1) == 1
    records = np.where(plain, -(-total // room), 1)
    of = np.repeat(np.arange(len(lengths)), records)
    place = ragged_ranges(np.zeros_like(records), records)
    last = place == records[of] - 1
    length = np.where(last, total[of] - place * room, room)
    return np.where(plain[of, None], np.where(lengths[of] > 0, length[:, None], 0), lengths[of]), ~last
