"""Units of work: runs of consecutive pieces of one source, which do not depend on who does them."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data_prep.config import DataConfig, TaskTest
from data_prep.console import UserError
from data_prep.selection.near_duplicates import DEFAULT_THRESHOLD
from data_prep.sources import Reader, open_source
from data_prep.sources.files import piece_length
from data_prep.sources.record import Piece, Record
from data_prep.tasks import public_row_format
from data_prep.tokenizer import Tokenizer

COUNTED_BYTES = 256 << 20
"""Of a malformed line in the first so many bytes of a file, the number is counted."""


@dataclass(frozen=True)
class Unit:
    """Some pieces of a source."""

    source: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(piece.size for piece in self.pieces)


class Job(BaseModel):
    """What is prepared, in a form that goes to other processes."""

    data: DataConfig
    tests: tuple[TaskTest, ...]
    """Rows of evaluation tasks, whose contexts training must not see."""
    commits: tuple[str | None, ...] = ()
    """The commit of each source that is a data set of the hub, so that all processes read the same; empty: not resolved yet."""

    def open_readers(self) -> list[Reader]:
        """The sources. Raises UserError where one cannot be read."""
        pinned = [
            source.model_copy(update={"revision": commit}) if commit else source
            for source, commit in itertools.zip_longest(self.data.sources, self.commits)
        ]
        return [open_source(source, self.data.views, f"data.sources.{index}") for index, source in enumerate(pinned)]

    @property
    def test_descriptions(self) -> list[dict[str, Any]]:
        """The tests as the manifest records them: where their rows are, and in which public form they may be."""
        return [
            test.model_dump(mode="json", exclude={"key", "task"}, exclude_none=True)
            | ({"form": test.task} if public_row_format(test.task) else {})
            for test in self.tests
        ]

    @property
    def partial(self) -> Path:
        """Where an unfinished preparation keeps what it has."""
        return Path(self.data.path) / ".partial"

    @property
    def near_threshold(self) -> float:
        """Likeness from which on records are near-duplicates."""
        return self.data.near_threshold or DEFAULT_THRESHOLD


def make_units(readers: Sequence[Reader]) -> list[Unit]:
    """All units, in the order of the sources. The more there is to read, the larger they are."""
    units = []
    for source, reader in enumerate(readers):
        pieces = reader.pieces()
        enough = piece_length(sum(piece.size for piece in pieces))
        begin = size = 0
        for end, piece in enumerate(pieces, start=1):
            size += piece.size
            if size >= enough or end == len(pieces):
                units.append(Unit(source, tuple(pieces[begin:end])))
                begin, size = end, 0
    return units


@cache
def open_job(serialized: str) -> tuple[Job, list[Reader]]:
    """A job and its readers, opened once in a process."""
    job = Job.model_validate_json(serialized)
    return job, job.open_readers()


@cache
def open_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of a corpus, opened once in a process."""
    return Tokenizer.load(Path(folder) / "tokenizer")


def read_unit(reader: Reader, unit: Unit) -> Iterator[tuple[int, Record]]:
    """The records of a unit, each with the number of its piece."""
    for number, piece in enumerate(unit.pieces):
        for record in reader.read(piece):
            yield number, record


def malformed_record_error(reader: Reader, piece: Piece, record: Record) -> UserError:
    """The error of a line that is no record."""
    return UserError(
        f"{record_location(reader, piece, record)}: {record.problem}; correct the line, or drop such lines with data.on_malformed=drop"
    )


def record_location(reader: Reader, piece: Piece, record: Record) -> str:
    """Return the place of a record in its file."""
    if piece.start <= COUNTED_BYTES:
        return reader.place(piece, record.position, positions_before(reader, piece))
    return f"{piece.path}, line {record.position:,} behind byte {piece.start:,}"  # far inside of a file it would take reading all before it


def positions_before(reader: Reader, piece: Piece) -> int:
    """Positions in the pieces of the same file that come before one. Reads them, so ask seldom."""
    return sum(
        reader.count(earlier)
        for earlier in reader.pieces()
        if earlier.path == piece.path and earlier.start < piece.start
    )
