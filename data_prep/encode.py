"""The second pass over a unit: tokenize the remaining records and write them to shards.

A record with several views that does not fit into a row is dropped. A plain document that does not fit is split into
several records without losing a token. `continues` is true for each of these records except the last, because the
document continues in the next one. The pass writes one or more shards per split, and finally a report in
`.partial/shards`.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.holdout import load_frequent_targets, split_function
from data_prep.layout import positions_needed
from data_prep.scan import BATCH_CHARACTERS, dropped_file, scan_report
from data_prep.selection import duplicates
from data_prep.selection.drops import MAX_EXAMPLES, DropCounter, excerpt
from data_prep.shards import write_shard
from data_prep.sources.record import Reader, Record
from data_prep.text_chunks import chunk_text
from data_prep.tokenizer import Tokenizer
from data_prep.units import Job, Unit, open_job, open_tokenizer, read_unit
from data_prep.utils.console import UserError
from data_prep.utils.files import read_json, write_json
from data_prep.utils.ragged import ragged_ranges, ragged_sums

SHARD_TOKENS = 1 << 25
"""Number of tokens at which a shard is full. This bounds the memory needed for a unit, however large its
file or row group."""
DOCUMENT_OVERHEAD = int(positions_needed(np.ones((1, 1), np.int64))[0]) - 1
"""Positions of a plain document in addition to its tokens: the first token and the end token."""


def shard_report(job: Job, number: int) -> Path:
    """Return the path of a unit's report, which is written after its shards."""
    return job.partial / "shards" / f"{number:06d}.json"


def duplicate_files(job: Job) -> dict[str, list[Path]]:
    """Return the files that list duplicates, by drop reason."""
    return {reason: sorted((job.partial / reason).glob("*.npy")) for reason in ("duplicate", "near_duplicate")}


def drop_reasons(job: Job, number: int) -> dict[int, str]:
    """Return the drop reason of each dropped record of a unit, by ordinal; "" if the scan has already counted it."""
    dropped = dict.fromkeys(np.load(dropped_file(job, number)).tolist(), "")
    for reason, files in duplicate_files(job).items():
        ordinals = duplicates.dropped(files, number).tolist()
        dropped |= {ordinal: reason for ordinal in ordinals if ordinal not in dropped}
    return dropped


def kept_records(
    job: Job, reader: Reader, number: int, unit: Unit, drops: DropCounter | None = None
) -> Iterator[tuple[int, Record]]:
    """Yield the kept records of a scanned unit, each with the number of its piece. Duplicates are counted in `drops`.

    Raises UserError if the scan found a different number of records.
    """
    dropped = drop_reasons(job, number)
    ordinal = -1
    for ordinal, (piece, record) in enumerate(read_unit(reader, unit)):
        reason = dropped.get(ordinal)
        if reason is None and record.views is not None:
            yield piece, record
        elif reason and drops is not None:
            drops.add(reason, piece, record.position, excerpt(record.texts))
    if ordinal + 1 != read_json(scan_report(job, number))["records"]:
        raise UserError(
            f"{unit.pieces[0].path} changed during the preparation; "
            "run the preparation again while no other process writes to this file"
        )


def encode_unit(serialized: str, number: int, unit: Unit) -> int:
    """Tokenize one unit, write its shards, and return the number of kept records."""
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
    """The current batch of records of a unit, and the tokens that are not yet in a shard."""

    def __init__(self, job: Job, number: int, unit: Unit, tokenizer: Tokenizer):
        self.job, self.number, self.unit, self.tokenizer = job, number, unit, tokenizer
        self.drops = DropCounter()
        self.split_of = split_function(job.data, unit.source, load_frequent_targets(job, unit.source))
        self.batch: list[tuple[int, Record]] = []
        self.characters = self.kept = 0
        self.parts: dict[str, list[tuple[list[np.ndarray], np.ndarray, np.ndarray]]] = {}
        """Batches since the last shard, by split: the tokens of each view, lengths (N, views) and `continues` (N,)."""
        self.shards: dict[str, list[dict[str, Any]]] = {}
        """Manifest entries of the shards, by split."""
        self.unknown: dict[str, dict[str, Any]] = {}
        """Statistics by split, for splits with unknown tokens.

        `tokens` is their number, `records` the number of records with one, and `first` lists the first of these. Each
        entry of `first` has the form of an example in DropCounter.
        """

    def add(self, piece: int, record: Record) -> None:
        """Add a record, and tokenize the batch when it is large enough."""
        self.batch.append((piece, record))
        self.characters += sum(map(len, record.texts))
        if self.characters >= BATCH_CHARACTERS:
            self._encode()

    def _encode(self) -> None:
        """Tokenize the batch, and write the shards that are full."""
        if not self.batch:
            return
        columns = [
            self._tokens([record.texts[view] for _, record in self.batch]) for view in range(len(self.job.data.views))
        ]
        lengths = np.stack([lengths for _, lengths in columns], axis=1)
        fits = self._drop_too_long_or_empty(lengths)
        splits = np.array([self.split_of(record) for _, record in self.batch])
        for split in sorted(set(splits[fits])):
            members = np.flatnonzero(fits & (splits == split))
            self._count_unknown(str(split), members, columns)
            tokens = []
            for values, view_lengths in columns:
                starts = np.cumsum(view_lengths) - view_lengths
                tokens.append(values[ragged_ranges(starts[members], view_lengths[members])])
            parts = self.parts.setdefault(str(split), [])
            parts.append((tokens, *_split_documents(lengths[members], self.job.data.sequence_length)))
            self.kept += len(members)
            if sum(len(values) for tokens, *_ in parts for values in tokens) >= SHARD_TOKENS:
                self._write(str(split))
        self.batch, self.characters = [], 0

    def _tokens(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated tokens of some texts, and the number of tokens of each (0 for a blank text)."""
        chunks = [
            chunk_text(text, self.tokenizer.encode_batch) if text and not text.isspace() else [] for text in texts
        ]
        values, chunk_lengths = self.tokenizer.encode_ragged(list(itertools.chain.from_iterable(chunks)))
        chunk_counts = np.fromiter(map(len, chunks), np.int64, len(chunks))
        return values, ragged_sums(chunk_lengths, chunk_counts)

    def _count_unknown(self, split: str, members: np.ndarray, columns: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Count the unknown tokens of some records.

        An unknown token replaces text that the tokenizer does not know. `columns` contains the tokens and lengths of
        each view.
        """
        if self.tokenizer.unknown_id is None:
            return
        unknown_counts = sum(
            ragged_sums((values == self.tokenizer.unknown_id).astype(np.int64), lengths)[members]
            for values, lengths in columns
        )
        affected = members[np.flatnonzero(unknown_counts)]
        if not len(affected):
            return
        entry = self.unknown.setdefault(split, {"tokens": 0, "records": 0, "first": []})
        entry["tokens"] += int(np.sum(unknown_counts))
        entry["records"] += len(affected)
        for row in affected[: MAX_EXAMPLES - len(entry["first"])]:
            piece, record = self.batch[row]
            entry["first"].append([piece, record.position, self._unknown_word(record.texts)])

    def _unknown_word(self, texts: tuple[str, ...]) -> str:
        """Return the first word with an unknown token, or the beginning of the record if no single word has one."""
        words = " ".join(texts).split()
        unknown_words = (
            word
            for word, ids in zip(words, self.tokenizer.encode_batch(words), strict=True)
            if self.tokenizer.unknown_id in ids
        )
        return excerpt((next(unknown_words, None) or " ".join(words),))

    def _drop_too_long_or_empty(self, lengths: np.ndarray) -> np.ndarray:
        """Count the records to drop, and return the mask of the records to keep: (N, views) -> (N,)."""
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
                    "empty", piece, record.position, f"the tokenizer produces no token for {excerpt(record.texts)}"
                )
        return fits

    def finish(self) -> None:
        """Tokenize the last batch and write the last shards."""
        self._encode()
        for split in sorted(self.parts):
            self._write(split)

    def _write(self, split: str) -> None:
        """Write the collected tokens of a split to a shard."""
        tokens, lengths, continues = zip(*self.parts.pop(split), strict=True)
        all_lengths = np.concatenate(lengths)
        views = {
            name: (np.concatenate([part[view] for part in tokens]), all_lengths[:, view])
            for view, name in enumerate(self.job.data.views)
        }
        shards = self.shards.setdefault(split, [])
        path = Path(self.job.data.path) / f"{split}-{self.number:05d}{f'.{len(shards):03d}' if shards else ''}.arrow"
        shards.append(write_shard(path, self.unit.source, views, np.concatenate(continues), self.tokenizer.vocab_size))


def _split_documents(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Split plain documents that exceed a row into several records.

    Takes lengths (N, views). Returns the lengths of the records (M, views), and whether each continues in the next
    one (M,).
    """
    room = sequence_length - DOCUMENT_OVERHEAD
    total = lengths.sum(axis=1)
    plain = (lengths > 0).sum(axis=1) == 1
    pieces = np.where(plain, -(-total // room), 1)
    document = np.repeat(np.arange(len(lengths)), pieces)
    position = ragged_ranges(np.zeros_like(pieces), pieces)
    last = position == pieces[document] - 1
    tokens_per_piece = np.where(last, total[document] - position * room, room)
    piece_lengths = np.where(lengths[document] > 0, tokens_per_piece[:, None], 0)
    return np.where(plain[document, None], piece_lengths, lengths[document]), ~last
