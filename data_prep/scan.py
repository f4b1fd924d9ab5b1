"""The first pass over a unit: which of its records are fit for the corpus, and what they are recognised by.

Leaves, below `.partial/scan`, the ordinals of the records that are dropped for what they are, the fingerprints of the others by which
duplicates are found across the whole corpus, and, last, a report with counts and examples.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from data_prep.config import DataConfig, FiltersConfig
from data_prep.console import UserError
from data_prep.files import atomic_path, read_json, write_json
from data_prep.holdout import TargetSample, split_function
from data_prep.selection import duplicates, near_duplicates
from data_prep.selection.contamination import Contamination
from data_prep.selection.drops import DropCounter, excerpt
from data_prep.selection.filters import SearchTimeoutError, filter_reason, search_time_limit
from data_prep.selection.task_contexts import contexts_file
from data_prep.sources.record import Piece, Reader, Record
from data_prep.units import Job, Unit, malformed_record_error, open_job, read_unit, record_location

BATCH_CHARACTERS = 1 << 20


def scan_report(job: Job, number: int) -> Path:
    """Where the report of a unit stands once it was scanned."""
    return job.partial / "scan" / f"{number:06d}.json"


def dropped_file(job: Job, number: int) -> Path:
    """The ordinals of a unit's records that the scan dropped."""
    return scan_report(job, number).with_suffix(".dropped.npy")


def target_file(job: Job, number: int) -> Path:
    """A sample of the targets of a unit."""
    return scan_report(job, number).with_suffix(".targets.npy")


def fingerprint_file(job: Job, number: int, kind: str) -> Path:
    """What a unit's records are recognised by: `exact`, or for near-duplicates `signatures` and `bands`."""
    return scan_report(job, number).with_suffix(f".{kind}.npy")


def scan_unit(serialized: str, number: int, unit: Unit) -> int:
    """Scan one unit; the number of its records. Raises UserError for a malformed one where that is an error."""
    job, readers = open_job(serialized)
    reader, config = readers[unit.source], job.data
    scan = _Scan(job, unit, contamination(serialized) if config.sources[unit.source].split == "train" else None)
    lacks = lacking(config, reader.provided_views)
    ordinal = -1
    with search_time_limit(config.filters):
        for ordinal, (piece, record) in enumerate(read_unit(reader, unit)):
            if record.views is None:
                if record.reason in ("malformed", "damaged") and config.on_malformed == "fail":
                    raise malformed_record_error(reader, unit.pieces[piece], record)
                scan.drop(record.reason, ordinal, piece, record, record.problem)
            elif reason := lacks(record.views) or _filtered(config.filters, reader, unit.pieces[piece], record):
                scan.drop(reason, ordinal, piece, record, excerpt(record.views))
            else:
                scan.keep(ordinal, piece, record)
    scan.finish(number)
    records = ordinal + 1
    write_json(
        scan_report(job, number),
        {
            "records": records,
            "positions": [reader.count(piece) for piece in unit.pieces],
            "dropped": scan.drops.by_reason,
        },
    )
    return records


def _filtered(filters: FiltersConfig, reader: Reader, piece: Piece, record: Record) -> str:
    """Return the reason to leave a record out by its text, or "". Raises UserError naming the record on which this cannot be decided."""
    try:
        return filter_reason(record.texts, filters)
    except SearchTimeoutError as problem:
        raise UserError(f"{record_location(reader, piece, record)}: {problem}") from None


class _Scan:
    """The records of a unit that are looked at together, and what was found so far."""

    def __init__(self, job: Job, unit: Unit, contamination: Contamination | None):
        self.job, self.unit, self.contamination = job, unit, contamination
        self.drops = DropCounter()
        self.dropped: list[int] = []
        self.batch: list[tuple[int, int, Record]] = []
        # For frequent targets, see data_prep/holdout.py, this is not the final split. Of two duplicates the other one may then stay.
        self.split_of = split_function(job.data, unit.source)
        self.targets = (
            TargetSample() if job.data.validation_fraction and job.data.sources[unit.source].split == "train" else None
        )
        self.characters = 0
        self.ordinals: list[int] = []
        self.ranks: list[int] = []
        self.fingerprints: list[np.ndarray] = []
        self.sketches: list[tuple[np.ndarray, np.ndarray]] = []

    def drop(self, reason: str, ordinal: int, piece: int, record: Record, note: str) -> None:
        self.drops.add(reason, piece, record.position, note)
        self.dropped.append(ordinal)

    def keep(self, ordinal: int, piece: int, record: Record) -> None:
        self.batch.append((ordinal, piece, record))
        self.characters += sum(map(len, record.texts))
        if self.characters >= BATCH_CHARACTERS:
            self._look()

    def _look(self) -> None:
        """Leave out what is contaminated, and note what the others are recognised by."""
        found = (
            self.contamination.find([record.texts for _, _, record in self.batch])
            if self.contamination
            else [""] * len(self.batch)
        )
        kept = []
        for (ordinal, piece, record), where in zip(self.batch, found, strict=True):
            if where:
                self.drop("contaminated", ordinal, piece, record, where)
            else:
                kept.append(record)
                self.ordinals.append(ordinal)
                self.ranks.append(duplicates.SPLIT_PRIORITY.index(self.split_of(record)))
        if self.targets:
            self.targets.add(kept)
        if kept and self.job.data.deduplicate != "none":
            views = [record.texts for record in kept]
            self.fingerprints.append(duplicates.fingerprints(views))
            if self.job.data.deduplicate == "near":
                self.sketches.append(near_duplicates.sketch(views, self.job.near_threshold))
        self.batch, self.characters = [], 0

    def finish(self, number: int) -> None:
        """Write all but the report."""
        self._look()
        with atomic_path(dropped_file(self.job, number)) as temporary, open(temporary, "wb") as file:
            np.save(file, np.sort(np.array(self.dropped, np.uint32)))
        if self.targets:
            self.targets.write(target_file(self.job, number))
        if self.job.data.deduplicate == "none":
            return
        ordinals, ranks = np.array(self.ordinals, np.uint32), np.array(self.ranks, np.uint8)
        fingerprints = np.concatenate([np.empty((0, 2), np.uint64), *self.fingerprints])
        duplicates.write_fingerprints(fingerprint_file(self.job, number, "exact"), fingerprints, ordinals, ranks)
        if self.job.data.deduplicate == "near":
            views, bands = len(self.job.data.views), near_duplicates.num_bands(self.job.near_threshold)
            nothing = np.empty((0, views, near_duplicates.NUM_HASHES), np.uint16), np.empty((0, bands, 2), np.uint64)
            signatures, keys = (np.concatenate(parts) for parts in zip(nothing, *self.sketches, strict=True))
            near_duplicates.write_sketches(
                fingerprint_file(self.job, number, "signatures"),
                fingerprint_file(self.job, number, "bands"),
                signatures,
                keys,
                ordinals,
                ranks,
            )


def lacking(config: DataConfig, provided_views: tuple[bool, ...]) -> Callable[[tuple[str, ...]], str]:
    """What gives the reason to drop a record for the views that hold no text, of those that its source fills; empty to keep it."""
    supplied = [view for view, fills in enumerate(provided_views) if fills]
    keeps_some = config.missing_views == "keep"

    def reason(views: tuple[str, ...]) -> str:
        present = [view for view in supplied if views[view] and not views[view].isspace()]
        if len(present) == len(supplied):
            return ""
        return "" if present and keeps_some else "one_sided" if present else "empty"

    return reason


@cache
def contamination(serialized: str) -> Contamination | None:
    """Return the contexts of the tests, read once in a process; None if there are no tests."""
    job, _ = open_job(serialized)
    return Contamination(read_json(contexts_file(job.partial))) if job.tests else None
