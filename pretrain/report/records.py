"""Records of finished runs: small archives that replace run directories in the report and in a resumed study.

A record is STUDY/records/RUN.tar.xz. It holds the files below RUN/ that the report and the study read: configuration,
environment, status, metrics, results and the answers of the last step. It holds no weights. The bytes depend on
the contents of these files only, so a record changes in git only if the run has changed.
"""

import atexit
import io
import lzma
import re
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from data_prep.utils.console import UserError
from data_prep.utils.files import atomic_path
from pretrain.report.runs import is_run
from pretrain.run_folder import REWINDS, read_metrics, read_status, step_name

RECORDS = "records"
"""Folder in a study folder with the records of its runs."""
REQUIRED = ("config.yaml", "environment.json", "metrics.jsonl", "status.json")
"""Files that every record holds."""
OPTIONAL = (REWINDS, "evaluation/results.jsonl")
"""Files that a record holds if the run has them."""
ANSWERS = "evaluation/answers"
"""Folder with the answers of a run's evaluations. A record holds the answers of the last step."""


def record_path(study_folder: Path, name: str) -> Path:
    """Return the path of the record of a run."""
    return study_folder / RECORDS / f"{name}.tar.xz"


def count_scored(study_folder: Path) -> int:
    """Return the number of runs with results in a study folder, whether or not the study still lists them."""
    recorded = {path.name.removesuffix(".tar.xz") for path in (study_folder / RECORDS).glob("*.tar.xz")}
    evaluated = {path.parent.parent.name for path in study_folder.glob("*/evaluation/results.jsonl")}
    return len(recorded | evaluated)


def write_record(run_dir: Path, path: Path) -> bool:
    """Write the record of a finished run, and return whether the file has changed."""
    step = step_name(read_status(run_dir)["step"])
    files = [run_dir / name for name in (*REQUIRED, *OPTIONAL)] + sorted((run_dir / ANSWERS).glob(f"*-{step}.jsonl"))
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for file in files:
            if not file.is_file():
                continue
            data = file.read_bytes()
            member = tarfile.TarInfo(f"{run_dir.name}/{file.relative_to(run_dir).as_posix()}")  # no time and no owner
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    compressed = lzma.compress(content.getvalue(), preset=9)
    if path.is_file() and path.read_bytes() == compressed:
        return False
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(compressed)
    return True


def read_record(path: Path) -> Path:
    """Extract a record, and return the run directory with its files. It is deleted when this process ends.

    Raises UserError if the record is damaged, or holds anything but the files of a finished run with its name.
    """
    return _read_record(path, path.stat().st_mtime_ns)


@cache
def _read_record(path: Path, changed: int) -> Path:
    name = path.name.removesuffix(".tar.xz")
    try:
        with tarfile.open(path, "r:xz") as archive:
            for member in archive:
                inside = member.name.removeprefix(f"{name}/")
                is_answers = re.fullmatch(rf"{ANSWERS}/[^/]+\.jsonl", inside)
                is_expected = inside in (*REQUIRED, *OPTIONAL) or is_answers
                if inside == member.name or not member.isreg() or not is_expected:
                    raise tarfile.TarError(f"{member.name} is not a file of the run {name}")
        run_dir = extract(path) / name
        missing = [file for file in REQUIRED if not (run_dir / file).is_file()]
        if missing:
            raise tarfile.TarError(f"it lacks {', '.join(missing)}")
        if read_status(run_dir).get("status") != "finished":
            raise tarfile.TarError("it is not the record of a finished run")
    except (OSError, tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: {_one_line(error)}; restore the file, or delete it to have the run repeated"
        ) from None
    return run_dir


def extract(archive: Path) -> Path:
    """Extract an archive of run directories to a folder that is deleted when this process ends, and return the folder.

    Raises UserError for a corrupt archive, and for one with links or paths that lead out of the folder.
    """
    temporary = tempfile.TemporaryDirectory(prefix="jepa-study-")
    atexit.register(temporary.cleanup)
    try:
        with tarfile.open(archive, "r:xz") as records:
            records.extractall(temporary.name, filter="data")
    except (OSError, tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UserError(
            f"cannot read {archive}: {_one_line(error)}; restore the file, or the run directories"
        ) from None
    return Path(temporary.name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def find_run(run_dir: Path, record: Path) -> Path | None:
    """Return the folder with the state of a run: its directory, or its extracted record if the record is further.

    Returns None if neither exists.
    """
    if not record.is_file():
        return run_dir if is_run(run_dir) else None
    recorded = read_record(record)
    return run_dir if is_run(run_dir) and _progress(run_dir) >= _progress(recorded) else recorded


def _progress(run_dir: Path) -> tuple[bool, int, int]:
    """Return whether a run is finished, its last logged step, and the number of its results."""
    metrics = read_metrics(run_dir)
    results = run_dir / "evaluation" / "results.jsonl"
    return (
        read_status(run_dir).get("status") == "finished",
        metrics[-1]["step"] if metrics else 0,
        results.read_bytes().count(b"\n") if results.is_file() else 0,
    )
