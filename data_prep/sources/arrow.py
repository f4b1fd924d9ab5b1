"""Arrow IPC files in the stream or the file format, such as `datasets.Dataset.save_to_disk` writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from data_prep.config import FileSource
from data_prep.sources import files
from data_prep.sources.arrow_values import records
from data_prep.sources.record import Piece, Record
from data_prep.sources.views import column_mapping
from data_prep.utils.console import UserError
from data_prep.utils.files import read_json

SUFFIXES = (".arrow",)
FILE_FORMAT = b"ARROW1"
"""First bytes of the file format; the stream format has no such mark."""
SPLITS, DATASET = "dataset_dict.json", "state.json"
"""Files of save_to_disk: SPLITS lists the splits of a DatasetDict, DATASET the Arrow files of a Dataset."""


class Arrow:
    """Reader of Arrow files; a file is a piece."""

    def __init__(self, source: FileSource, views: tuple[str, ...], name: str, paths: list[str] | None = None):
        self.files, self.note = _find(source, name) if paths is None else (paths, "")
        self.mappings = {}
        for path in self.files:
            with opened(path) as (schema, _):
                self.mappings[path] = column_mapping(source, views, schema.names, path, name)
        self.provided_views = tuple(
            map(any, zip(*(mapping.provided_views for mapping in self.mappings.values()), strict=True))
        )

    def pieces(self) -> list[Piece]:
        """Divide the source into pieces; see `Reader.pieces`."""
        sizes = {path: files.size_of(path) for path in self.files}
        return [Piece(path, 0, size, size) for path, size in sizes.items()]

    def read(self, piece: Piece) -> Iterator[Record]:
        """Read a piece; see `Reader.read`."""
        mapping = self.mappings[piece.path]
        before = 0
        with opened(piece.path) as (_, batches):
            for batch in batches:
                yield from records(batch.select(mapping.columns), mapping, before)
                before += batch.num_rows

    def count(self, piece: Piece) -> int:
        """Count positions; see `Reader.count`."""
        return 0

    def place(self, piece: Piece, position: int, before: int) -> str:
        """Return the location of a record; see `Reader.place`."""
        return f"{piece.path}:{before + position}"


def _find(source: FileSource, name: str) -> tuple[list[str], str]:
    path = Path(source.path or "")
    if (path / SPLITS).is_file():
        raise UserError(
            f"{path} ({name}.path) has the splits {', '.join(splits_of(path))}: set the path to "
            f"one of their folders, such as {path / splits_of(path)[0]}, or use type: hub with hub_split"
        )
    return (saved_files(path), "") if (path / DATASET).is_file() else files.find_files_with_note(source, name, SUFFIXES)


def splits_of(folder: Path) -> list[str]:
    """Return the names of the splits that save_to_disk wrote; each is a folder. Raises UserError if there are none."""
    return [str(split) for split in _entries(folder / SPLITS, "splits")]


def saved_files(folder: Path) -> list[str]:
    """Return the Arrow files of a Dataset that save_to_disk wrote, without the caches next to them.

    Raises UserError if a file is missing.
    """
    paths = [str(folder / str(entry.get("filename"))) for entry in _entries(folder / DATASET, "_data_files")]
    for path in paths:
        if not Path(path).is_file():
            raise UserError(
                f"{path} is missing, but {folder / DATASET} lists it: write the folder again with save_to_disk"
            )
    return paths


def _entries(path: Path, key: str) -> list[Any]:
    try:
        entries = read_json(path)[key]
        if isinstance(entries, list) and entries:
            return entries
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} lists no {key}: write the folder again with save_to_disk")


@contextmanager
def opened(path: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Yield the schema and the batches of a file. Raises UserError if it cannot be read."""
    try:
        with pa.OSFile(path) as file:
            magic = file.read(len(FILE_FORMAT))
            file.seek(0)
            reader = pa.ipc.open_file(file) if magic == FILE_FORMAT else pa.ipc.open_stream(file)
            if magic == FILE_FORMAT:
                batches: Iterator[pa.RecordBatch] = (
                    reader.get_batch(number) for number in range(reader.num_record_batches)
                )
            else:
                batches = iter(reader)
            yield reader.schema, batches
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise files.read_error(path, error) from None
        raise UserError(
            f"{path} is corrupt or not an Arrow file ({' '.join(str(error).split())[:200]}): replace it"
        ) from None
