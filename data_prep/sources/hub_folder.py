"""Sources of `type: hub` whose path is a local folder, read with this project's readers for their file types.

`datasets` would reinterpret the values of JSON and CSV files, so it does not read them. It still decides which
files belong to a split, because it knows the hub's file name conventions and README.md settings.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.config import FileSource, HubSource
from data_prep.sources import arrow, csv_rows, json_lines, parquet
from data_prep.sources.arrow import Arrow
from data_prep.sources.csv_rows import Csv
from data_prep.sources.files import SHOWN_FILES
from data_prep.sources.json_lines import JsonLines
from data_prep.sources.parquet import Parquet
from data_prep.sources.record import Reader
from data_prep.utils.console import UserError

if TYPE_CHECKING:
    from datasets import DatasetBuilder

READERS: dict[tuple[str, ...], Callable[..., Reader]] = {
    arrow.SUFFIXES: Arrow,
    csv_rows.SUFFIXES: Csv,
    json_lines.SUFFIXES: JsonLines,
    parquet.SUFFIXES: Parquet,
}
SUPPORTED_SETTINGS = {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter"}
"""Settings of a `datasets` builder that leave the text of files unchanged, or that the readers here support."""


def is_saved(source: HubSource) -> bool:
    """Return whether save_to_disk wrote the folder."""
    folder = Path(source.path)
    return (folder / arrow.SPLITS).is_file() or (folder / arrow.DATASET).is_file()


def check_saved_split(source: HubSource, name: str) -> None:
    """Raise UserError if a folder that save_to_disk wrote does not have the split."""
    folder = Path(source.path)
    if (folder / arrow.SPLITS).is_file():
        _check_split(source, name, arrow.splits_of(folder))
    elif source.hub_split != "train":
        raise UserError(f"{folder} ({name}.path) is a data set of save_to_disk without splits: remove {name}.hub_split")


def open_saved(source: HubSource, views: tuple[str, ...], name: str) -> Reader | None:
    """Open a folder that save_to_disk wrote; return None for any other.

    Raises UserError if the folder cannot be read.
    """
    folder = Path(source.path)
    has_splits = (folder / arrow.SPLITS).is_file()
    if not is_saved(source):
        return None
    if source.config is not None:
        raise UserError(
            f"{folder} ({name}.path) was written by save_to_disk and has no configurations: remove {name}.config"
        )
    check_saved_split(source, name)
    if has_splits:
        folder /= source.hub_split
    return Arrow(_as_files(source), views, name, arrow.saved_files(folder))


def open_files(source: HubSource, views: tuple[str, ...], name: str, builder: "DatasetBuilder") -> Reader | None:
    """Open the files that `builder` finds in a local folder.

    Returns None if no reader here reads these files as the builder would. Raises UserError if the folder does not have
    the split.
    """
    files = _files_by_split(source, builder)
    _check_split(source, name, list(files))
    split_files = files[source.hub_split]
    make = next(
        (reader for suffixes, reader in READERS.items() if all(file.endswith(suffixes) for file in split_files)), None
    )
    if make is None or not _is_standard(builder.config):
        return None
    delimiter = {"delimiter": builder.config.sep} if make is Csv else {}
    reader = make(_as_files(source), views, name, split_files, **delimiter)
    reader.note = _note(source, name, {file for one_split in files.values() for file in one_split})
    return reader


def text_files(source: HubSource, name: str, builder: "DatasetBuilder") -> list[str]:
    """Return the JSON or CSV files that `builder` finds in a local folder.

    The list is empty if the builder finds other files, or reads them with special settings.
    """
    files = _files_by_split(source, builder)
    _check_split(source, name, list(files))
    split_files = files[source.hub_split]
    all_text = all(file.endswith(json_lines.SUFFIXES + csv_rows.SUFFIXES) for file in split_files)
    return split_files if all_text and _is_standard(builder.config) else []


def _files_by_split(source: HubSource, builder: "DatasetBuilder") -> dict[str, list[str]]:
    return {
        str(split): [_named_as_given(source.path, file) for file in split_files]
        for split, split_files in (builder.config.data_files or {}).items()
    }


def _as_files(source: HubSource) -> FileSource:
    return FileSource(path=source.path, views=source.views)


def _check_split(source: HubSource, name: str, splits: list[str]) -> None:
    if source.hub_split not in splits:
        raise UserError(
            f"{source.path} ({name}.path) has no split {source.hub_split!r}, only "
            f"{', '.join(splits) or '(none)'}: set {name}.hub_split"
        )


def _is_standard(config: Any) -> bool:
    """Return whether a README.md sets no special options, such as the quote character of a CSV file."""
    standard = vars(type(config)())
    return all(value == standard.get(key) for key, value in vars(config).items() if key not in SUPPORTED_SETTINGS)


def _named_as_given(folder: str, file: str) -> str:
    """Return the path of a file with the folder spelled as the user wrote it, as in the file statistics of a corpus."""
    return str(Path(folder) / os.path.relpath(file, os.path.realpath(folder)))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _note(source: HubSource, name: str, files_in_splits: set[str]) -> str:
    """Return a note that names the data files of a folder that are in no split; empty if there are none."""
    folder = Path(source.path)
    suffixes = tuple(suffix for reader_suffixes in READERS for suffix in reader_suffixes)
    data_files = (path for path in folder.rglob("*") if path.name.endswith(suffixes))
    visible = {str(path) for path in data_files if not _is_hidden(path.relative_to(folder))}
    in_no_split = sorted(visible - files_in_splits)
    if not in_no_split:
        return ""
    examples = ", ".join([*in_no_split[:SHOWN_FILES], *(["..."] if len(in_no_split) > SHOWN_FILES else [])])
    count = f"{len(in_no_split):,} files are" if len(in_no_split) > 1 else "a file is"
    return (
        f"note: {source.path} ({name}.path) is read as on the hub, by file names or its README.md, and {count} in no "
        f"split: {examples}; to read all files of one type, set that type, such as type: json"
    )
