"""Which training records are held out for validation: `data.validation_fraction` of them, drawn by a text of the record.

That text is the target, so that no target is on both sides, or for a record of a group that of the group. A frequent target, such as a label
or "not answerable", would go to one side with all its records: these are drawn by their context instead. The scan keeps a sample of the
targets of each unit, and this decides after it which targets are frequent, from the samples alone: for any number of processes alike.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from data_prep.config import DataConfig
from data_prep.files import atomic_path, read_json, read_json_or_none, write_json
from data_prep.sources.record import Record
from data_prep.units import Job, Unit

SAMPLE = 1024
"""Records of a unit whose targets are looked at."""
FEW = 5
"""A target is frequent if it has more than 1 / FEW of the records that are to be held out, ..."""
REPEATED = 10
"""... and more records than this."""
GOLDEN = 0x9E3779B97F4A7C15
"""Multiples of it modulo 2^64 are spread evenly (Knuth, The Art of Computer Programming 3, section 6.4)."""


def split_function(data: DataConfig, source: int, frequent: frozenset[int] = frozenset()) -> Callable[[Record], str]:
    """Return the function from a record of a source to its split; `frequent` are the hashes of its frequent targets."""
    split, fraction = data.sources[source].split, data.validation_fraction
    if split != "train" or not fraction:
        return lambda record: split

    def drawn(record: Record) -> str:
        draw = _number(record.group or _target(record))
        if draw in frequent and not record.group:
            draw = _number(_context(record))
        return "validation" if draw / 2**64 < fraction else "train"

    return drawn


def load_frequent_targets(job: Job, source: int) -> frozenset[int]:
    """Return the hashes of the frequent targets of a source, as `find_frequent_targets` has found them."""
    decided: list[list[int]] = read_json(_decision(job))
    return frozenset(decided[source])


class TargetSample:
    """The targets of some records of a unit, chosen by a hash of their number, so that they are spread over all of it."""

    def __init__(self) -> None:
        self.records = 0
        self.sample: list[tuple[int, str]] = []
        """(hash of the record's number, target)."""
        self.limit = 1 << 64
        """Records with smaller hashes are in the sample."""

    def add(self, records: Iterable[Record]) -> None:
        """Look at records; those of a group are not drawn by target."""
        for record in records:
            if not record.group:
                self.records += 1
                number = self.records * GOLDEN % (1 << 64)
                if number < self.limit:
                    self.sample.append((number, _target(record)))
        if len(self.sample) > 8 * SAMPLE:
            self._shrink()

    def write(self, path: Path) -> None:
        """Write the number of records and the hashes of the targets."""
        self._shrink()
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.array([self.records, *(_number(target) for _, target in self.sample)], np.uint64))

    def _shrink(self) -> None:
        self.sample = sorted(self.sample)[:SAMPLE]
        if len(self.sample) == SAMPLE:
            self.limit = self.sample[-1][0]


def find_frequent_targets(job: Job, units: list[Unit], sample_file: Callable[[int], Path]) -> list[int]:
    """Find the frequent targets of each source, and keep them; return how many each source has."""
    decided: list[list[int]] = []
    for source in range(len(job.data.sources)):
        files = [sample_file(number) for number, unit in enumerate(units) if unit.source == source]
        samples = [np.load(file) for file in files if file.exists()]  # a unit that an older version scanned has none
        records = sum(int(sample[0]) for sample in samples)
        targets = np.concatenate([np.empty(0, np.uint64), *(sample[1:] for sample in samples)])
        decided.append(
            frequent_targets(targets, records, job.data.validation_fraction) if job.data.validation_fraction else []
        )
    if read_json_or_none(_decision(job)) != decided:
        write_json(_decision(job), decided)
    return [len(targets) for targets in decided]


def frequent_targets(targets: np.ndarray, records: int, fraction: float) -> list[int]:
    """Return the frequent ones of the targets of `records` records, of which `targets` are a sample, as hashes."""
    values, counts = np.unique(targets, return_counts=True)
    rates = counts / max(1, len(targets))
    frequent = (rates * FEW > fraction) & (rates * records > REPEATED) & (counts > 1)
    return [int(value) for value in values[frequent]]


def _decision(job: Job) -> Path:
    return job.partial / "frequent_targets.json"


def _target(record: Record) -> str:
    return record.texts[-1] or next(view for view in reversed(record.texts) if view.strip())


def _context(record: Record) -> str:
    return next(view for view in record.texts if view.strip())


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
