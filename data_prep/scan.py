"""The first pass over a unit: filter its records and compute their fingerprints.

The pass writes three kinds of files below `.partial/scan`: the ordinals of the dropped records; the fingerprints of the
kept records, from which duplicates are found across the whole corpus; and finally a report with counts and examples.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from data_prep.config import DataConfig, FiltersConfig
from data_prep.holdout import TargetSample, split_function
from data_prep.selection import duplicates, near_duplicates
from data_prep.selection.contamination import Contamination
from data_prep.selection.drops import DropCounter, excerpt
from data_prep.selection.filters import SearchTimeoutError, filter_reason, search_time_limit
from data_prep.selection.task_contexts import contexts_file
from data_prep.sources.record import Piece, Reader, Record
from data_prep.units import Job, Unit, malformed_record_error, open_job, read_unit, record_location
from data_prep.utils.console import UserError
from data_prep.utils.files import atomic_path, read_json, write_json

BATCH_CHARACTERS = 1 << 20


def scan_report(job: Job, number: int) -> Path:
    """Return the path of a unit's report, which the scan writes last."""
    return job.partial / "scan" / f"{number:06d}.json"


def dropped_file(job: Job, number: int) -> Path:
    """Return the path of the file with the ordinals of the records that the scan dropped."""
    return scan_report(job, number).with_suffix(".dropped.npy")


def target_file(job: Job, number: int) -> Path:
    """Return the path of the file with a sample of a unit's targets."""
    return scan_report(job, number).with_suffix(".targets.npy")


def fingerprint_file(job: Job, number: int, kind: str) -> Path:
    """Return the path of a unit's fingerprints: `exact` ones, or `signatures` and `bands` for near-duplicates."""
    return scan_report(job, number).with_suffix(f".{kind}.npy")


def scan_unit(serialized: str, number: int, unit: Unit) -> int:
    """Scan one unit and return the number of its records.

    Raises UserError for a malformed record unless `data.on_malformed` is drop.
    """
    job, readers = open_job(serialized)
    reader = readers[unit.source]
    config = job.data
    scan = _Scan(job, unit, contamination(serialized) if config.sources[unit.source].split == "train" else None)
    missing_view_reason = missing_view_filter(config, reader.provided_views)
    ordinal = -1
    with search_time_limit(config.filters):
        for ordinal, (piece, record) in enumerate(read_unit(reader, unit)):
            if record.views is None:
                if record.reason in ("malformed", "damaged") and config.on_malformed == "fail":
                    raise malformed_record_error(reader, unit.pieces[piece], record)
                scan.drop(record.reason, ordinal, piece, record, record.problem)
            elif reason := missing_view_reason(record.views) or _filtered(
                config.filters, reader, unit.pieces[piece], record
            ):
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
    """Return the reason to drop a record by its text, or "".

    Raises UserError with the location of the record if the search for the forbidden expression takes too long.
    """
    try:
        return filter_reason(record.texts, filters)
    except SearchTimeoutError as problem:
        raise UserError(f"{record_location(reader, piece, record)}: {problem}") from None


class _Scan:
    """The current batch of records of a unit, and the results so far."""

    def __init__(self, job: Job, unit: Unit, contamination: Contamination | None):
        self.job, self.unit, self.contamination = job, unit, contamination
        self.drops = DropCounter()
        self.dropped: list[int] = []
        self.batch: list[tuple[int, int, Record]] = []
        # For records with a frequent target this is not the final split (see data_prep/holdout.py). It only determines
        # which one of several duplicates is kept.
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
        """Count a dropped record."""
        self.drops.add(reason, piece, record.position, note)
        self.dropped.append(ordinal)

    def keep(self, ordinal: int, piece: int, record: Record) -> None:
        """Add a record that passed the filters, and process the batch when it is large enough."""
        self.batch.append((ordinal, piece, record))
        self.characters += sum(map(len, record.texts))
        if self.characters >= BATCH_CHARACTERS:
            self._process_batch()

    def _process_batch(self) -> None:
        """Drop the contaminated records of the batch, and compute the fingerprints of the rest."""
        matches = (
            self.contamination.find([record.texts for _, _, record in self.batch])
            if self.contamination
            else [""] * len(self.batch)
        )
        kept = []
        for (ordinal, piece, record), match in zip(self.batch, matches, strict=True):
            if match:
                self.drop("contaminated", ordinal, piece, record, match)
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
        """Process the last batch and write all files except the report."""
        self._process_batch()
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
            views = len(self.job.data.views)
            bands, _ = near_duplicates.band_shape(self.job.near_threshold)
            empty = np.empty((0, views, near_duplicates.NUM_HASHES), np.uint16), np.empty((0, bands, 2), np.uint64)
            signatures, keys = (np.concatenate(parts) for parts in zip(empty, *self.sketches, strict=True))
            near_duplicates.write_sketches(
                fingerprint_file(self.job, number, "signatures"),
                fingerprint_file(self.job, number, "bands"),
                signatures,
                keys,
                ordinals,
                ranks,
            )


def missing_view_filter(config: DataConfig, provided_views: tuple[bool, ...]) -> Callable[[tuple[str, ...]], str]:
    """Return a function that maps the views of a record to a reason to drop it, or to "" if it is kept.

    A record is dropped for missing text in the views that its source provides.
    """
    supplied = [view for view, provided in enumerate(provided_views) if provided]
    keep_incomplete = config.missing_views == "keep"

    def reason(views: tuple[str, ...]) -> str:
        present = [view for view in supplied if views[view] and not views[view].isspace()]
        if len(present) == len(supplied):
            return ""
        if not present:
            return "empty"
        return "" if keep_incomplete else "one_sided"

    return reason


@cache
def contamination(serialized: str) -> Contamination | None:
    """Return the check against the contexts of the tests, or None if there are no tests. Cached per process."""
    job, _ = open_job(serialized)
    return Contamination(read_json(contexts_file(job.partial))) if job.tests else None
