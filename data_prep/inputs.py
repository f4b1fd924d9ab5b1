"""The files that a corpus is made from: whether they are still those that it was made from."""

from pathlib import Path
from typing import Any

from data_prep.config import HubSource
from data_prep.console import UserError
from data_prep.files import read_json, read_json_or_none, sha256_file, write_json
from data_prep.selection.task_contexts import list_test_files
from data_prep.sources import Reader
from data_prep.tokenizer_files import ADDED, CONFIG, MAP
from data_prep.units import Job

BESIDE = (ADDED, CONFIG, MAP)
"""Files that add tokens to a sentencepiece model beside them."""
FileStats = dict[str, list[int]]
"""Of each file, its size in bytes and when it was last modified, in nanoseconds."""
FILE_STATS_NAME = ".modified.json"
"""The stamps of the files of a finished corpus: where they stay, no checksum needs to be computed."""


def file_stats(job: Job, readers: list[Reader]) -> FileStats:
    """The stamps of all files: of the sources, the tokenizer that is taken over, and the tests."""
    paths = {piece.path for reader in readers for piece in reader.pieces()} | {
        file for test in job.tests for file in list_test_files(test)
    }
    for source in job.data.sources:
        if isinstance(source, HubSource):  # a local folder; what the hub has is held by `revision`
            paths |= {str(file) for file in Path(source.path).rglob("*") if not file.name.startswith(".")}
    if job.data.tokenizer.path is not None:
        given = Path(job.data.tokenizer.path)
        inside = [file for pattern in ("*token*.json", "*.model") for file in given.glob(pattern)]
        beside = [given.with_name(name) for name in BESIDE] if given.suffix == ".model" else []
        paths |= set(map(str, inside if given.is_dir() else [given, *beside]))
    found = {}
    for path in sorted(paths):
        file = Path(path)
        if (
            file.is_file()
        ):  # a data set of the hub is none; a tokenizer that is not there is named when it is taken over
            found[path] = [file.stat().st_size, file.stat().st_mtime_ns]
    return found


def groups(files: FileStats, enough: int) -> list[list[str]]:
    """The files in groups of at least `enough` bytes."""
    found: list[list[str]] = [[]]
    size = 0
    for path, (of_file, _) in files.items():
        found[-1].append(path)
        size += of_file
        if size >= enough:
            found.append([])
            size = 0
    return [group for group in found if group]


def write_checksums(out: Path, paths: list[str]) -> int:
    """A task: the SHA-256 of some files, into a file."""
    write_json(out, {path: sha256_file(Path(path)) for path in paths})
    return 0


def read_checksums(folder: Path) -> dict[str, str]:
    """What `write_checksums` left in a folder."""
    return {path: checksum for file in sorted(folder.glob("*.json")) for path, checksum in read_json(file).items()}


def changed_settings(stored: dict[str, Any], job: Job) -> list[str]:
    """Return the keys of a job that differ from the settings of a manifest. Earlier versions did not record how tests were read."""
    data = job.data.shard_settings()
    changed = [f"data.{key}" for key in data if stored["data"].get(key) != data[key]]
    return changed + ["evaluation.tasks"] * (stored.get("tests", job.test_descriptions) != job.test_descriptions)


def check_unchanged(stored: dict[str, Any], job: Job, now: FileStats, folder: Path) -> None:
    """Raise UserError if a corpus was made from other settings, tests or files. `stored` are those of its manifest."""
    changed = changed_settings(stored, job)
    if not changed:
        trusted = read_json_or_none(folder / FILE_STATS_NAME) or {}
        a_model = (job.data.tokenizer.path or "").endswith(
            ".model"
        )  # of which earlier versions did not record the files beside it
        compared = stored["files"] | {
            path: stamp for path, stamp in now.items() if not a_model or Path(path).name not in BESIDE
        }
        changed = [
            f"content of {path}"
            for path in sorted(compared)
            if trusted.get(path) != now.get(path) and not _same(path, stored["files"].get(path), now.get(path))
        ]
    if changed:
        raise UserError(
            f"{folder} was prepared with another {' and '.join(changed[:3])}; "
            "choose another data.path, or remove that folder to prepare it anew"
        )


def _same(path: str, stored: dict[str, Any] | None, now: list[int] | None) -> bool:
    return (
        stored is not None
        and now is not None
        and stored["bytes"] == now[0]
        and sha256_file(Path(path)) == stored["sha256"]
    )
