"""The input files of a corpus, and the check that they have not changed since its preparation."""

from pathlib import Path
from typing import Any

from data_prep.config import HubSource
from data_prep.selection.task_contexts import list_test_files
from data_prep.sources import Reader
from data_prep.tokenizer_files import ADDED, CONFIG, MAP
from data_prep.units import Job
from data_prep.utils.console import UserError
from data_prep.utils.files import read_json, read_json_or_none, sha256_file, write_json

ADDED_TOKEN_FILES = (ADDED, CONFIG, MAP)
"""Names of files that add tokens to a sentencepiece model in the same folder."""
FileStats = dict[str, list[int]]
"""Size in bytes and time of modification in nanoseconds of each file, by path."""
FILE_STATS_NAME = ".modified.json"
"""File with the FileStats of a finished corpus. If they are unchanged, no checksum needs to be computed."""


def file_stats(job: Job, readers: list[Reader]) -> FileStats:
    """Return the FileStats of all input files: the sources, the imported tokenizer, and the tests."""
    source_files = {piece.path for reader in readers for piece in reader.pieces()}
    paths = source_files | {file for test in job.tests for file in list_test_files(test)}
    for source in job.data.sources:
        if isinstance(source, HubSource):  # finds files only in a local folder; `revision` pins a data set on the hub
            paths |= {str(file) for file in Path(source.path).rglob("*") if not file.name.startswith(".")}
    if job.data.tokenizer.path is not None:
        tokenizer = Path(job.data.tokenizer.path)
        files_inside = [file for pattern in ("*token*.json", "*.model") for file in tokenizer.glob(pattern)]
        is_model = tokenizer.suffix == ".model"
        files_beside = [tokenizer.with_name(name) for name in ADDED_TOKEN_FILES] if is_model else []
        paths |= set(map(str, files_inside if tokenizer.is_dir() else [tokenizer, *files_beside]))
    stats = {}
    for path in sorted(paths):
        file = Path(path)
        # A data set on the hub is not a file. A missing tokenizer is reported when it is imported.
        if file.is_file():
            stats[path] = [file.stat().st_size, file.stat().st_mtime_ns]
    return stats


def group_by_size(files: FileStats, min_bytes: int) -> list[list[str]]:
    """Return the paths in groups of at least `min_bytes` bytes."""
    result: list[list[str]] = [[]]
    size = 0
    for path, (file_size, _) in files.items():
        result[-1].append(path)
        size += file_size
        if size >= min_bytes:
            result.append([])
            size = 0
    return [group for group in result if group]


def write_checksums(out: Path, paths: list[str]) -> int:
    """Write the SHA-256 of some files to the file `out` (run as a task)."""
    write_json(out, {path: sha256_file(Path(path)) for path in paths})
    return 0


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the checksums that `write_checksums` wrote to a folder, by path."""
    return {path: checksum for file in sorted(folder.glob("*.json")) for path, checksum in read_json(file).items()}


def changed_settings(stored: dict[str, Any], job: Job) -> list[str]:
    """Return the keys of a job that differ from the settings of a manifest.

    Tests are compared only if the manifest records them, because earlier versions did not.
    """
    data = job.data.shard_settings()
    changed = [f"data.{key}" for key in data if stored["data"].get(key) != data[key]]
    return changed + ["evaluation.tasks"] * (stored.get("tests", job.test_descriptions) != job.test_descriptions)


def check_unchanged(stored: dict[str, Any], job: Job, now: FileStats, folder: Path) -> None:
    """Raise UserError if the settings, tests or files differ from the ones in a manifest, `stored`."""
    changed = changed_settings(stored, job)
    if not changed:
        trusted = read_json_or_none(folder / FILE_STATS_NAME) or {}
        # Earlier versions did not record the files next to a sentencepiece model.
        is_model = (job.data.tokenizer.path or "").endswith(".model")
        compared = stored["files"] | {
            path: stats for path, stats in now.items() if not is_model or Path(path).name not in ADDED_TOKEN_FILES
        }
        suspects = [path for path in sorted(compared) if trusted.get(path) != now.get(path)]
        changed = [
            f"content of {path}"
            for path in suspects
            if not _is_unchanged(path, stored["files"].get(path), now.get(path))
        ]
    if changed:
        raise UserError(
            f"{folder} was prepared with a different {' and '.join(changed[:3])}; "
            "choose a different data.path, or remove that folder to prepare it again"
        )


def _is_unchanged(path: str, stored: dict[str, Any] | None, now: list[int] | None) -> bool:
    return (
        stored is not None
        and now is not None
        and stored["bytes"] == now[0]
        and sha256_file(Path(path)) == stored["sha256"]
    )
