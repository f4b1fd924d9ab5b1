"""The splits of a file, a folder or a data set on the hub, each as a source of the configuration."""

import glob
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.config import DataConfig, HubSource, Source, Split
from data_prep.sources import arrow, csv_rows, files, json_lines, parquet
from data_prep.sources.hub import split_names
from data_prep.utils.config_file import validate
from data_prep.utils.console import UserError

SUFFIXES: dict[str, tuple[str, ...]] = {
    "json": json_lines.SUFFIXES,
    "csv": csv_rows.SUFFIXES,
    "parquet": parquet.SUFFIXES,
    "arrow": arrow.SUFFIXES,
    "text": tuple(kind + (compression or "") for kind in (".txt", ".md", ".rst") for compression in files.OPENERS),
    "python": (".py",),
}
"""Endings of the file names by type of source."""
SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Words in the names of files and splits, with the meaning that they have on the hub."""
HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
Values = dict[str, str]
"""Keys and values of a source in the configuration."""


@dataclass
class Found:
    """The splits of the data."""

    splits: dict[Split, Values] = field(default_factory=dict)
    """Source of each split, in the order train, validation, test."""
    notes: list[str] = field(default_factory=list)
    """Sentences on files that are not used, and on guesses."""

    @property
    def kind(self) -> str:
        """Type of the sources."""
        return self.splits["train"]["type"]


def as_source(values: Values) -> Source:
    """Return a source of the configuration from its keys."""
    data = {"path": "corpus", "sources": [values], "tokenizer": {"vocab_size": 512}}
    return validate(DataConfig, data, "data").sources[0]


def find_splits(where: str, config: str | None = None) -> Found:
    """Return the splits of a file, a folder or a data set on the hub. Raises UserError if there is no data.

    `config` is the configuration of a data set in the layout of the hub.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        if (path / arrow.SPLITS).is_file() or (path / arrow.DATASET).is_file() or config is not None:
            return _hub_splits(where, config)
        return _folder_splits(path)
    if path.exists():
        return _file_split(path)
    kind = _kind_of(where)
    if kind is not None or not HUB_NAME.fullmatch(where):
        raise UserError(f"there is no file or folder {where}: correct the path, or give owner/name of a hub data set")
    try:
        return _hub_splits(where, config)
    except UserError as error:
        raise UserError(f"there is no file or folder {where}, and on the hub: {error}") from None


def _kind_of(name: str) -> str | None:
    return next((kind for kind, suffixes in SUFFIXES.items() if name.endswith(suffixes)), None)


def _split_of(name: str) -> Split | None:
    """Return the split that a name contains as a word, such as train in `mrpc_train.jsonl`; None if there is none."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _split_in(folder: Path, file: Path) -> Split | None:
    """Return the split of a file below a folder: of the outermost folder between them with a split, else of its name.

    The layout of the hub has the same rule.
    """
    *folders, name = file.relative_to(folder).parts
    return next((split for part in (*folders, name) if (split := _split_of(part))), None)


def _file_split(path: Path) -> Found:
    kind = _kind_of(path.name)
    if kind is None:
        endings = ", ".join(suffixes[0] for suffixes in SUFFIXES.values())
        raise UserError(f"{path}: unknown type of file; rename it to end in {endings} or .tsv, after its format")
    found = Found({"train": {"type": kind, "path": str(path)}})
    siblings = [
        sibling.name
        for sibling in sorted(path.parent.iterdir())
        if sibling != path and _kind_of(sibling.name) == kind and _split_of(sibling.name) in ("validation", "test")
    ]
    if siblings and _split_of(path.name) == "train":
        found.notes.append(f"{path.parent} also has {', '.join(siblings)}; name the folder to use its splits")
    return found


def _folder_splits(folder: Path) -> Found:
    by_kind: dict[str, list[Path]] = defaultdict(list)
    for name in files.files_below(str(folder)):
        file = Path(name)
        kind = None if any(part.startswith(".") for part in file.relative_to(folder).parts) else _kind_of(name)
        if kind is not None and file.name != "README.md":
            by_kind[kind].append(file)
    data_kinds = [kind for kind in by_kind if kind not in ("text", "python")] or list(by_kind)
    if len(data_kinds) > 1:
        with_splits = [kind for kind in data_kinds if any(_split_in(folder, file) for file in by_kind[kind])]
        data_kinds = with_splits if len(with_splits) == 1 else data_kinds
    if len(data_kinds) > 1:
        kinds = ", ".join(f"{len(by_kind[kind]):,} {kind}" for kind in data_kinds)
        raise UserError(f"{folder} has files of several types ({kinds}): name one of them, or a folder with one type")
    if not data_kinds:
        endings = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes if suffix.count(".") == 1)
        raise UserError(f"{folder} has no data: there is no file that ends in {endings}")
    kind = data_kinds[0]
    by_split: dict[Split, list[Path]] = defaultdict(list)
    others = []
    for file in by_kind[kind]:
        split = _split_in(folder, file)
        by_split[split].append(file) if split else others.append(file)
    if kind in ("text", "python"):
        return _document_splits(folder, kind, by_split, others)
    return _data_splits(folder, kind, by_split, others)


def _names(paths: list[Path], folder: Path) -> str:
    """Return the names of the first files."""
    return ", ".join(str(path.relative_to(folder)) for path in paths[:3]) + ", ..." * (len(paths) > 3)


def _document_splits(folder: Path, kind: str, by_split: dict[Split, list[Path]], others: list[Path]) -> Found:
    """Return the splits of text or Python files: those in the names, if each file has one, else training data only.

    Names such as `test_reader.py` and `training.md` are common in folders without splits. Test files are not used,
    because a task reads rows.
    """
    kept_out = sorted(path for split, paths in by_split.items() if split != "train" for path in paths)
    if not kept_out or others or "train" not in by_split:
        found = Found({"train": {"type": kind, "path": str(folder)}})
        if kept_out:
            found.notes.append(
                f"all files are training data, also {_names(kept_out, folder)}; if these are not, divide all files "
                "into folders named train, validation and test"
            )
        return found
    found = Found()
    for split in ("train", "validation"):
        if split in by_split:
            found.splits[split] = {"type": kind, "path": _path_of(by_split[split], folder)}
    if "test" in by_split:
        found.notes.append(
            f"not used, because a task reads JSON lines and not documents: {_names(by_split['test'], folder)}"
        )
    return found


def _path_of(paths: list[Path], folder: Path) -> str:
    """Return the file, folder or pattern that matches exactly these files. Raises UserError if there is none."""
    names = set(map(str, paths))
    if len(names) == 1:
        return str(paths[0])
    parent = os.path.commonpath(names)
    if set(files.files_below(parent)) == names:
        return parent
    start = os.path.commonprefix(sorted(names))  # noqa: RUF071 a pattern may start with a part of a name
    pattern = f"{glob.escape(start)}*{paths[0].suffix}"
    if set(glob.glob(pattern)) == names:
        return pattern
    raise UserError(f"{folder}: move the files of each split into a folder: {_names(paths, folder)}")


def _data_splits(folder: Path, kind: str, by_split: dict[Split, list[Path]], others: list[Path]) -> Found:
    """Return the splits of the data files of one type in a folder."""
    paths = sorted([*others, *(path for split_paths in by_split.values() for path in split_paths)])
    has_description = (folder / "README.md").is_file() and "configs:" in (folder / "README.md").read_text(
        "utf-8", "replace"
    )
    single_files = all(len(split_files) == 1 for split_files in by_split.values())
    if has_description or (by_split.keys() - {"train"} and (kind != "json" or not single_files)):
        # tasks read rows of other types from a folder of type hub only
        found = _hub_splits(str(folder), None)
        if not has_description and (missing := by_split.keys() - found.splits.keys()):
            names = _names(sorted(path for split in missing for path in by_split[split]), folder)
            raise UserError(
                f"{folder}: the rules of the hub do not find {names}: move the files of each split into a folder named "
                "train, validation or test"
            )
        return found
    found = Found()
    if "train" in by_split and single_files:
        for split in ("train", "validation", "test"):
            if split in by_split:
                found.splits[split] = {"type": kind, "path": str(by_split[split][0])}
        if others:
            found.notes.append(f"not used, because no split is in the name: {_names(others, folder)}")
        return found
    found.splits["train"] = {"type": kind, "path": str(paths[0] if len(paths) == 1 else folder)}
    if by_split.keys() - {"train"} and len(paths) > 1:
        found.notes.append("all files are training data, because none has train in its name")
    return found


def _hub_splits(where: str, config: str | None) -> Found:
    """Return the splits of a data set on the hub, or of a local folder with its layout."""
    values = {"type": "hub", "path": where} | ({"config": config} if config is not None else {})
    source = as_source(values)
    assert isinstance(source, HubSource)
    names = split_names(source)
    found = Found()
    for wanted in ("train", "validation", "test"):
        chosen = next((name for name in names if name == wanted), None)
        chosen = chosen or next((name for name in names if _split_of(name) == wanted), None)
        if chosen is not None:
            found.splits[wanted] = values | ({"hub_split": chosen} if names != ["train"] else {})
    if "train" not in found.splits:
        others = {split: one for split, one in found.splits.items() if one.get("hub_split") != names[0]}
        found.splits = {"train": values | {"hub_split": names[0]}}
        found.splits.update(others)
        found.notes.append(f"there is no split train, so the training data are the split {names[0]}")
    used = {one.get("hub_split", "train") for one in found.splits.values()}
    if unused := [name for name in names if name not in used]:
        found.notes.append(f"not used: the split{'s' * (len(unused) > 1)} {', '.join(unused)}")
    return found
