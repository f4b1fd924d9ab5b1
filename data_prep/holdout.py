"""Selection of the training records that are held out for validation: a fraction `data.validation_fraction` of them.

A record is drawn by the hash of a text. For a record of a group this text is the name of the group; for any other
record it is the target, to keep every target in one split only. A frequent target, such as a label or "not answerable",
would put all its records into one split; these records are drawn by their context instead. The scan keeps a sample of
the targets of each unit. After the scan, the frequent targets are determined from these samples alone, so they
do not depend on the number of processes.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from data_prep.config import DataConfig
from data_prep.sources.record import Record
from data_prep.units import Job, Unit
from data_prep.utils.files import atomic_path, read_json, read_json_or_none, write_json

SAMPLE_SIZE = 1024
"""Maximum number of targets in the sample of a unit."""
FREQUENCY_DIVISOR = 5
"""A frequent target has more than 1 / FREQUENCY_DIVISOR of the number of records to be held out."""
MAX_RARE_RECORDS = 10
"""A frequent target has more than this number of records."""
GOLDEN = 0x9E3779B97F4A7C15
"""Multiplier of Fibonacci hashing modulo 2^64 (Knuth, The Art of Computer Programming 3, section 6.4)."""


def split_function(data: DataConfig, source: int, frequent: frozenset[int] = frozenset()) -> Callable[[Record], str]:
    """Return a function that maps a record of a source to its split.

    `frequent` contains the hashes of the source's frequent targets.
    """
    split = data.sources[source].split
    fraction = data.validation_fraction
    if split != "train" or not fraction:
        return lambda record: split

    def draw_split(record: Record) -> str:
        key = _hash(record.group or _target(record))
        if key in frequent and not record.group:
            key = _hash(_context(record))
        return "validation" if key / 2**64 < fraction else "train"

    return draw_split


def load_frequent_targets(job: Job, source: int) -> frozenset[int]:
    """Return the hashes of the frequent targets of a source, which `find_frequent_targets` has written."""
    frequent: list[list[int]] = read_json(_frequent_targets_file(job))
    return frozenset(frequent[source])


class TargetSample:
    """A sample of the targets of a unit. Records are chosen by a hash of their number, evenly over the unit."""

    def __init__(self) -> None:
        self.records = 0
        self.sample: list[tuple[int, str]] = []
        """Pairs (hash of the record's number, target)."""
        self.limit = 1 << 64
        """Upper limit of the hashes in the sample."""

    def add(self, records: Iterable[Record]) -> None:
        """Add the targets of records to the sample, except records of a group, which are not drawn by target."""
        for record in records:
            if not record.group:
                self.records += 1
                key = self.records * GOLDEN % (1 << 64)
                if key < self.limit:
                    self.sample.append((key, _target(record)))
        if len(self.sample) > 8 * SAMPLE_SIZE:
            self._shrink()

    def write(self, path: Path) -> None:
        """Write the number of records and the hashes of the targets."""
        self._shrink()
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.array([self.records, *(_hash(target) for _, target in self.sample)], np.uint64))

    def _shrink(self) -> None:
        self.sample = sorted(self.sample)[:SAMPLE_SIZE]
        if len(self.sample) == SAMPLE_SIZE:
            self.limit = self.sample[-1][0]


def find_frequent_targets(job: Job, units: list[Unit], sample_file: Callable[[int], Path]) -> list[int]:
    """Find the frequent targets of each source, write their hashes, and return their number for each source."""
    frequent: list[list[int]] = []
    for source in range(len(job.data.sources)):
        files = [sample_file(number) for number, unit in enumerate(units) if unit.source == source]
        # A sample is missing if the source is not divided or was scanned by an earlier version.
        samples = [np.load(file) for file in files if file.exists()]
        records = sum(int(sample[0]) for sample in samples)
        targets = np.concatenate([np.empty(0, np.uint64), *(sample[1:] for sample in samples)])
        frequent.append(
            frequent_targets(targets, records, job.data.validation_fraction) if job.data.validation_fraction else []
        )
    if read_json_or_none(_frequent_targets_file(job)) != frequent:
        write_json(_frequent_targets_file(job), frequent)
    return [len(targets) for targets in frequent]


def frequent_targets(targets: np.ndarray, records: int, fraction: float) -> list[int]:
    """Return the hashes of the frequent targets. `targets` is a sample of the hashes of `records` targets."""
    values, counts = np.unique(targets, return_counts=True)
    rates = counts / max(1, len(targets))
    frequent = (rates * FREQUENCY_DIVISOR > fraction) & (rates * records > MAX_RARE_RECORDS) & (counts > 1)
    return [int(value) for value in values[frequent]]


def _frequent_targets_file(job: Job) -> Path:
    return job.partial / "frequent_targets.json"


def _target(record: Record) -> str:
    return record.texts[-1] or next(view for view in reversed(record.texts) if view.strip())


def _context(record: Record) -> str:
    return next(view for view in record.texts if view.strip())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
