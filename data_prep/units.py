"""Units of work: runs of consecutive pieces of one source. They do not depend on the number of processes."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data_prep.config import DataConfig, TaskTest
from data_prep.selection.near_duplicates import DEFAULT_THRESHOLD
from data_prep.sources import Reader, open_source
from data_prep.sources.files import piece_length
from data_prep.sources.record import Piece, Record
from data_prep.tasks import public_row_format
from data_prep.tokenizer import Tokenizer
from data_prep.utils.console import UserError

COUNTED_BYTES = 256 << 20
"""Largest offset of a piece, in bytes, for which error messages count lines from the beginning of the file."""


@dataclass(frozen=True)
class Unit:
    """Consecutive pieces of a source."""

    source: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Return the number of bytes of input."""
        return sum(piece.size for piece in self.pieces)


class Job(BaseModel):
    """The description of a preparation, which can be serialized for other processes."""

    data: DataConfig
    tests: tuple[TaskTest, ...]
    """Rows of evaluation tasks, whose contexts training must not see."""
    commits: tuple[str | None, ...] = ()
    """The commit of each source on the hub, and None for other sources; empty until the commits are resolved."""

    def open_readers(self) -> list[Reader]:
        """Return the readers of all sources. Raises UserError if a source cannot be read."""
        pinned = [
            source.model_copy(update={"revision": commit}) if commit else source
            for source, commit in itertools.zip_longest(self.data.sources, self.commits)
        ]
        return [open_source(source, self.data.views, f"data.sources.{index}") for index, source in enumerate(pinned)]

    @property
    def test_descriptions(self) -> list[dict[str, Any]]:
        """Return the tests as the manifest records them: the source of the rows, and the task with their row format."""
        return [
            test.model_dump(mode="json", exclude={"key", "task"}, exclude_none=True)
            | ({"form": test.task} if public_row_format(test.task) else {})
            for test in self.tests
        ]

    @property
    def partial(self) -> Path:
        """Return the folder with the results of an unfinished preparation."""
        return Path(self.data.path) / ".partial"

    @property
    def near_threshold(self) -> float:
        """Return the minimum similarity of near-duplicates."""
        return self.data.near_threshold or DEFAULT_THRESHOLD


def make_units(readers: Sequence[Reader]) -> list[Unit]:
    """Return all units, in the order of the sources. The size of a unit grows with the size of its source."""
    units = []
    for source, reader in enumerate(readers):
        pieces = reader.pieces()
        min_size = piece_length(sum(piece.size for piece in pieces))
        begin = size = 0
        for end, piece in enumerate(pieces, start=1):
            size += piece.size
            if size >= min_size or end == len(pieces):
                units.append(Unit(source, tuple(pieces[begin:end])))
                begin, size = end, 0
    return units


@cache
def open_job(serialized: str) -> tuple[Job, list[Reader]]:
    """Return a job and its readers, cached per process."""
    job = Job.model_validate_json(serialized)
    return job, job.open_readers()


@cache
def open_tokenizer(folder: str) -> Tokenizer:
    """Return the tokenizer of a corpus, cached per process."""
    return Tokenizer.load(Path(folder) / "tokenizer")


def read_unit(reader: Reader, unit: Unit) -> Iterator[tuple[int, Record]]:
    """Yield the records of a unit, each with the number of its piece."""
    for number, piece in enumerate(unit.pieces):
        for record in reader.read(piece):
            yield number, record


def malformed_record_error(reader: Reader, piece: Piece, record: Record) -> UserError:
    """Return the error for a line that is not a valid record, or from which on a file is corrupt."""
    remedy = (
        "use the records before this place with data.on_malformed=drop"
        if record.reason == "damaged"
        else "fix the line, or drop such lines with data.on_malformed=drop"
    )
    return UserError(f"{record_location(reader, piece, record)}: {record.problem}; {remedy}")


def record_location(reader: Reader, piece: Piece, record: Record) -> str:
    """Return the location of a record in its file."""
    if piece.start <= COUNTED_BYTES:
        return reader.place(piece, record.position, positions_before(reader, piece))
    # The line number in the whole file would require reading everything in front of the piece.
    return f"{piece.path}, line {record.position:,} after byte {piece.start:,}"


def positions_before(reader: Reader, piece: Piece) -> int:
    """Return the number of positions in the preceding pieces of the same file. Slow, because it reads these pieces."""
    return sum(
        reader.count(earlier)
        for earlier in reader.pieces()
        if earlier.path == piece.path and earlier.start < piece.start
    )
