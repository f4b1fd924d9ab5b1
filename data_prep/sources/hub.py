"""Data sets of the Hugging Face hub, streamed, or local folders that the `datasets` library reads."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.config import HubSource
from data_prep.sources.arrow import SPLITS, splits_of
from data_prep.sources.files import LARGEST_PIECE
from data_prep.sources.hub_folder import check_saved_split, is_saved, open_files, open_saved, text_files
from data_prep.sources.record import Piece, Reader, Record
from data_prep.sources.views import column_mapping
from data_prep.utils.console import UserError

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset


COMMIT = re.compile(r"@([0-9a-f]{40})(?:/|$)")
"""Commit in the address of a data set on the hub, `hf://datasets/OWNER/NAME@COMMIT`."""


def open_hub(source: HubSource, views: tuple[str, ...], name: str) -> Reader:
    """Open a local folder with the reader of its file type, and stream any other data set.

    Raises UserError if it cannot be opened.
    """
    if source.path.startswith((".", "/")) and not Path(source.path).exists():
        raise UserError(f"there is no folder {source.path} ({name}.path)")
    if saved := open_saved(source, views, name):
        return saved
    with as_user_error(f"cannot open the data set {source.path} ({name}.path), split {source.hub_split}"):
        builder = open_builder(source)
    local = open_files(source, views, name, builder) if Path(source.path).is_dir() else None
    return local or Hub(source, views, name, builder)


class Hub:
    """Reader of a streamed data set; each of its shards (files) is a piece."""

    note = ""

    def __init__(self, source: HubSource, views: tuple[str, ...], name: str, builder: "DatasetBuilder"):
        self.title = f"hub:{source.path}:{source.hub_split}"
        with as_user_error(f"cannot open the data set {source.path} ({name}.path), split {source.hub_split}"):
            self.rows = builder.as_streaming_dataset(split=source.hub_split)
            columns = self.rows.column_names or list(next(iter(self.rows), {}))
        self.mapping = column_mapping(source, views, columns, self.title, name)
        self.provided_views = self.mapping.provided_views
        if self.rows.column_names:
            self.rows = self.rows.select_columns(list(self.mapping.columns))

    def pieces(self) -> list[Piece]:
        """Divide the source into pieces; see `Reader.pieces`."""
        size = self.rows.info.dataset_size or self.rows.info.download_size or 0
        shards = self.rows.num_shards
        return [Piece(self.title, shard, shard + 1, size // shards or LARGEST_PIECE) for shard in range(shards)]

    def read(self, piece: Piece) -> Iterator[Record]:
        """Read a piece; see `Reader.read`."""
        with as_user_error(f"cannot read shard {piece.start} of {self.title}"):
            for position, row in enumerate(self.rows.shard(self.rows.num_shards, piece.start), start=1):
                yield from self.mapping.records(row, position)

    def count(self, piece: Piece) -> int:
        """Count positions; see `Reader.count`."""
        return 0  # rows are counted within their shard

    def place(self, piece: Piece, position: int, before: int) -> str:
        """Return the location of a record; see `Reader.place`."""
        return f"{piece.path}:shard {piece.start}:{position}"


def open_rows(source: HubSource, name: str) -> "list[str] | IterableDataset":
    """Return the rows of one split, or the JSON or CSV files of a local folder.

    The files are returned unread because `datasets` would change the text in them. Raises UserError if the data set
    cannot be read.
    """
    if source.path.startswith((".", "/")) and not Path(source.path).exists():
        raise UserError(f"there is no folder {source.path} ({name}.path)")
    with as_user_error(f"cannot read the data set {source.path} ({name}), split {source.hub_split}"):
        if is_saved(source):
            check_saved_split(source, name)
            import datasets

            saved = datasets.load_from_disk(source.path)
            return (saved[source.hub_split] if isinstance(saved, datasets.DatasetDict) else saved).to_iterable_dataset()
        builder = open_builder(source)
        files = text_files(source, name, builder) if Path(source.path).is_dir() else []
        return files or builder.as_streaming_dataset(split=source.hub_split)


def split_names(source: HubSource) -> list[str]:
    """Return the names of the splits of a data set. Raises UserError if it cannot be opened or has no split."""
    folder = Path(source.path)
    if is_saved(source):
        return splits_of(folder) if (folder / SPLITS).is_file() else ["train"]
    with as_user_error(f"cannot open the data set {source.path}"):
        builder = open_builder(source)
        names = [str(name) for name in builder.config.data_files or builder.info.splits or ()]
    if not names:
        raise UserError(f"{source.path} names no splits; write the source by hand, with hub_split (docs/data.md)")
    return names


def commit_of(source: HubSource, name: str) -> str | None:
    """Return the commit that the revision of a hub data set currently points to; None for a local folder.

    Raises UserError if the hub cannot be read.
    """
    if Path(source.path).is_dir() or source.path.startswith((".", "/")):
        return None
    with as_user_error(f"cannot open the data set {source.path} ({name}.path), split {source.hub_split}"):
        match = COMMIT.search(str(open_builder(source).base_path))
    return match[1] if match else None


def open_builder(source: HubSource) -> "DatasetBuilder":
    """Return the builder with which `datasets` reads a data set. Importing `datasets` takes more than a second."""
    import datasets

    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # errors are reported in one line
    return datasets.load_dataset_builder(source.path, source.config, revision=source.revision)


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Convert any error of the library to a UserError of one line; its error classes have no common base."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}") from None
