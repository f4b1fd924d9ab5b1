"""Local folders of `type: hub`, read by the readers of their files: what the `datasets` library reads as JSON or CSV it also reinterprets.

Which files belong to a split is left to `datasets`: it knows the names and the README.md of the hub's layout.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.config import FileSource, HubSource
from data_prep.console import UserError
from data_prep.sources import arrow, csv_rows, json_lines, parquet
from data_prep.sources.arrow import Arrow
from data_prep.sources.csv_rows import Csv
from data_prep.sources.files import SHOWN_FILES
from data_prep.sources.json_lines import JsonLines
from data_prep.sources.parquet import Parquet
from data_prep.sources.record import Reader

if TYPE_CHECKING:
    from datasets import DatasetBuilder

READERS: dict[tuple[str, ...], Callable[..., Reader]] = {
    arrow.SUFFIXES: Arrow,
    csv_rows.SUFFIXES: Csv,
    json_lines.SUFFIXES: JsonLines,
    parquet.SUFFIXES: Parquet,
}
WITHOUT_EFFECT = {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter"}
"""Settings of a builder of `datasets` that leave the text of its files as it is, or that a reader here has too."""


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
        raise UserError(
            f"{folder} ({name}.path) is a single data set of save_to_disk, without splits: leave out {name}.hub_split"
        )


def open_saved(source: HubSource, views: tuple[str, ...], name: str) -> Reader | None:
    """Open a folder that save_to_disk wrote; None if it is another. Raises UserError."""
    folder = Path(source.path)
    has_splits = (folder / arrow.SPLITS).is_file()
    if not is_saved(source):
        return None
    if source.config is not None:
        raise UserError(
            f"{folder} ({name}.path) was written by save_to_disk and has no configurations: leave out {name}.config"
        )
    check_saved_split(source, name)
    if has_splits:
        folder /= source.hub_split
    return Arrow(_as_files(source), views, name, arrow.saved_files(folder))


def open_files(source: HubSource, views: tuple[str, ...], name: str, builder: "DatasetBuilder") -> Reader | None:
    """Open the files that `builder` finds in a local folder; None if no reader here reads them as it does. Raises UserError."""
    files = _files_by_split(source, builder)
    _check_split(source, name, list(files))
    found = files[source.hub_split]
    make = next(
        (reader for suffixes, reader in READERS.items() if all(file.endswith(suffixes) for file in found)), None
    )
    if make is None or not _is_standard(builder.config):
        return None
    delimiter = {"delimiter": builder.config.sep} if make is Csv else {}
    reader = make(_as_files(source), views, name, found, **delimiter)
    reader.note = _note(source, name, {file for of_split in files.values() for file in of_split})
    return reader


def text_files(source: HubSource, name: str, builder: "DatasetBuilder") -> list[str]:
    """Return the files of JSON or CSV that `builder` finds in a local folder; none if it reads other files, or reads them in another way."""
    files = _files_by_split(source, builder)
    _check_split(source, name, list(files))
    found = files[source.hub_split]
    return (
        found
        if _is_standard(builder.config)
        and all(file.endswith(json_lines.SUFFIXES + csv_rows.SUFFIXES) for file in found)
        else []
    )


def _files_by_split(source: HubSource, builder: "DatasetBuilder") -> dict[str, list[str]]:
    return {
        str(split): [_below(source.path, file) for file in found]
        for split, found in (builder.config.data_files or {}).items()
    }


def _as_files(source: HubSource) -> FileSource:
    return FileSource(path=source.path, views=source.views)


def _check_split(source: HubSource, name: str, splits: list[str]) -> None:
    if source.hub_split not in splits:
        raise UserError(
            f"{source.path} ({name}.path) has no split {source.hub_split!r}, only {', '.join(splits) or 'none'}: set {name}.hub_split"
        )


def _is_standard(config: Any) -> bool:
    """Return whether a README.md leaves out settings such as the quotes of a CSV file."""
    standard = vars(type(config)())
    return all(value == standard.get(key) for key, value in vars(config).items() if key not in WITHOUT_EFFECT)


def _below(folder: str, file: str) -> str:
    """Return a path as it is named in the stamps of a corpus: below the folder as it was given."""
    return str(Path(folder) / os.path.relpath(file, os.path.realpath(folder)))


def _note(source: HubSource, name: str, read: set[str]) -> str:
    """Return a line that names the data files of a folder that are in no split; empty if there are none."""
    folder, suffixes = Path(source.path), tuple(suffix for of_reader in READERS for suffix in of_reader)
    data_files = (path for path in folder.rglob("*") if path.name.endswith(suffixes))
    visible = {
        str(path) for path in data_files if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    left_out = sorted(visible - read)
    if not left_out:
        return ""
    examples = ", ".join([*left_out[:SHOWN_FILES], *(["..."] if len(left_out) > SHOWN_FILES else [])])
    some = f"{len(left_out):,} files are" if len(left_out) > 1 else "a file is"
    return (
        f"note: {source.path} ({name}.path) is read as the hub does, by the names of files or its README.md, and {some} in no split: {examples}; "
        "to read all files of a kind, set its type, such as type: json"
    )
