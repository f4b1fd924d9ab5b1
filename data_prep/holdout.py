"""Which training records are held out for validation: `data.validation_fraction` of them, drawn by a text of the record.

That text is the target, so that no target is on both sides, or for a record of a group that of the group. Where a source has few targets, such
as labels, whole classes would be held out or none at all: its records are drawn by their context instead, and no context is on both sides.
The scan keeps a sample of the targets of each unit, and this decides after it, from the samples alone: for any number of processes alike.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from data_prep.config import DataConfig
from data_prep.files import atomic_path, read_json, read_json_or_nothing, write_json
from data_prep.sources.record import Record
from data_prep.units import Job, Unit

SAMPLE = 1024
"""Records of a unit whose targets are looked at."""
FEW = 5
"""A source has few targets if a draw by target would hold out fewer of them than this, ..."""
REPEATED = 10
"""... and a target has more records than this. Both are means over the records."""
GOLDEN = 0x9E3779B97F4A7C15
"""Multiples of it modulo 2^64 are spread evenly (Knuth, The Art of Computer Programming 3, section 6.4)."""


def split_function(data: DataConfig, source: int, by_context: bool = False) -> Callable[[Record], str]:
    """Return the function from a record of a source to its split."""
    split, fraction = data.sources[source].split, data.validation_fraction
    if split != "train" or not fraction:
        return lambda record: split

    def drawn(record: Record) -> str:
        by = record.group or (_context(record) if by_context else _target(record))
        return "validation" if _number(by) / 2**64 < fraction else "train"
    return drawn


def drawn_by_context(job: Job, source: int) -> bool:
    """Return what `decide` has decided about a source."""
    decided: list[bool] = read_json(_decision(job))
    return decided[source]


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


def decide(job: Job, units: list[Unit], sample_file: Callable[[int], Path]) -> list[int]:
    """Decide for each source how its records are drawn, and keep the decision; return the sources that are drawn by context."""
    decided = []
    for source in range(len(job.data.sources)):
        files = [sample_file(number) for number, unit in enumerate(units) if unit.source == source]
        samples = [np.load(file) for file in files if file.exists()]  # a unit that an older version scanned has none
        records = sum(int(sample[0]) for sample in samples)
        targets = np.concatenate([np.empty(0, np.uint64), *(sample[1:] for sample in samples)])
        decided.append(bool(job.data.validation_fraction) and has_few_targets(targets, records, job.data.validation_fraction))
    if read_json_or_nothing(_decision(job)) != decided:
        write_json(_decision(job), decided)
    return [source for source, by_context in enumerate(decided) if by_context]


def has_few_targets(targets: np.ndarray, records: int, fraction: float) -> bool:
    """Return whether a draw by target would be a lottery; `targets` are a sample of the targets of `records` records."""
    _, counts = np.unique(targets, return_counts=True)
    pairs = len(targets) * (len(targets) - 1)
    if not pairs:
        return False
    alike = float((counts * (counts - 1)).sum()) / pairs  # chance that two records have the same target
    return alike * FEW > fraction and alike * records > REPEATED


def _decision(job: Job) -> Path:
    return job.partial / "drawn_by_context.json"


def _target(record: Record) -> str:
    return record.texts[-1] or next(view for view in reversed(record.texts) if view.strip())


def _context(record: Record) -> str:
    return next(view for view in record.texts if view.strip())


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
