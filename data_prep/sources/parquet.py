"""Parquet files, divided into row groups."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.config import FileSource
from data_prep.sources import files
from data_prep.sources.arrow_values import records
from data_prep.sources.record import Piece, Record
from data_prep.sources.views import column_mapping
from data_prep.utils.console import UserError

SUFFIXES = (".parquet",)
BATCH_ROWS = 1024


class Parquet:
    """Reader of Parquet files; several small row groups form one piece."""

    def __init__(self, source: FileSource, views: tuple[str, ...], name: str, paths: list[str] | None = None):
        self.files, self.note = files.find_files_with_note(source, name, SUFFIXES) if paths is None else (paths, "")
        self.mappings = {}
        self.sizes: dict[str, list[int]] = {}
        """Bytes on disk of the row groups of each file."""
        for path in self.files:
            with opened(path) as file:
                self.mappings[path] = column_mapping(source, views, file.schema_arrow.names, path, name)
                groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
                self.sizes[path] = [
                    sum(group.column(index).total_compressed_size for index in range(group.num_columns))
                    for group in groups
                ]
        self.provided_views = tuple(
            map(any, zip(*(mapping.provided_views for mapping in self.mappings.values()), strict=True))
        )

    def pieces(self) -> list[Piece]:
        """Divide the source into pieces; see `Reader.pieces`."""
        smallest = files.piece_length(sum(map(sum, self.sizes.values())))
        pieces = []
        for path, sizes in self.sizes.items():
            start, total = 0, 0
            for stop, size in enumerate(sizes, start=1):
                total += size
                if total >= smallest or stop == len(sizes):
                    pieces.append(Piece(path, start, stop, total))
                    start, total = stop, 0
        return pieces

    def read(self, piece: Piece) -> Iterator[Record]:
        """Read a piece; see `Reader.read`."""
        mapping = self.mappings[piece.path]
        before = 0
        with opened(piece.path) as file:
            for batch in file.iter_batches(
                BATCH_ROWS, range(piece.start, piece.stop), mapping.columns, use_threads=False
            ):
                yield from records(batch, mapping, before)
                before += batch.num_rows

    def count(self, piece: Piece) -> int:
        """Count positions; see `Reader.count`."""
        if piece.stop - piece.start == len(self.sizes[piece.path]):
            return 0
        with opened(piece.path) as file:
            return sum(file.metadata.row_group(group).num_rows for group in range(piece.start, piece.stop))

    def place(self, piece: Piece, position: int, before: int) -> str:
        """Return the location of a record; see `Reader.place`."""
        return f"{piece.path}:{before + position}"


@contextmanager
def opened(path: str) -> Iterator[pq.ParquetFile]:
    """Yield a Parquet file. Raises UserError if it cannot be read."""
    try:
        status = os.stat(path)
        with pq.ParquetFile(
            path, page_checksum_verification=True, metadata=_metadata(path, status.st_size, status.st_mtime_ns)
        ) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise files.read_error(path, error) from None
        raise UserError(
            f"{path} is corrupt or not a Parquet file ({' '.join(str(error).split())[:200]}): replace it"
        ) from None


@lru_cache(maxsize=4)
def _metadata(path: str, size: int, changed: int) -> pq.FileMetaData:
    """Return the footer of a file, cached because reading it is slow if there are thousands of row groups."""
    return pq.read_metadata(path)


def read_objects(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a file with all their columns, each with its number from 1."""
    number = 0
    with opened(path) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row
