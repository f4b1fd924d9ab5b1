"""Records replace run directories in a report. Damaged and foreign records are refused."""

import io
import json
import lzma
import os
import re
import shutil
import tarfile

import pytest

from data_prep.utils.console import UserError
from pretrain.report.arms import read_comparison
from pretrain.report.records import RECORDS, read_record, record_path, write_record
from pretrain.run_folder import step_name
from tests.pretrain.report.report_helpers import render_report

VALUES = {"plain": {1: 0.5, 2: 0.6, 3: 0.55}, "pairs": {1: 0.7, 2: 0.9, 3: 0.8}}


def pack(study):
    """Write the records of all runs, and remove the run directories."""
    for run in [path for path in study.iterdir() if path.is_dir() and path.name != RECORDS]:
        write_record(run, record_path(study, run.name))
        shutil.rmtree(run)


def members(path):
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def rewrite(path, entries, **changes):
    """Write an archive with these files; `changes` are attributes of the last one."""
    with tarfile.open(path, "w:xz") as archive:
        for number, (name, data) in enumerate(entries.items(), 1):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if number == len(entries):
                for key, value in changes.items():
                    setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))


def test_records_have_the_same_report_as_run_directories(study_with_values):
    study = study_with_values(VALUES)
    before, page = render_report(study)
    assert "Worst examples" in page and "context</td>" in page  # the runs have answers
    pack(study)
    text, page = render_report(study)
    assert text == before and "context</td>" in page
    assert str(record_path(study, "arm0-1")) in page and "jepa-study-" not in page.partition("<h2>Runs</h2>")[2]
    assert all(path.stat().st_size < 100_000 for path in (study / RECORDS).iterdir())


def test_equal_run_directories_have_equal_records(study_with_values, tmp_path):
    study = study_with_values(VALUES)
    record = record_path(study, "arm0-1")
    assert write_record(study / "arm0-1", record) and not write_record(study / "arm0-1", record)
    other = tmp_path / "elsewhere" / "arm0-1"
    names = sorted(os.walk(study / "arm0-1"), reverse=True)
    for folder, _, files in names:
        target = other / os.path.relpath(folder, study / "arm0-1")
        target.mkdir(parents=True, exist_ok=True)
        for name in sorted(files, reverse=True):
            shutil.copyfile(os.path.join(folder, name), target / name)
            os.utime(target / name, (1, 1))
            (target / name).chmod(0o600)
    copy = record_path(tmp_path, "arm0-1")
    write_record(other, copy)
    assert copy.read_bytes() == record.read_bytes()
    step = json.loads((other / "status.json").read_text())["step"]
    assert {name.removeprefix("arm0-1/") for name in members(record)} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "status.json",
        "evaluation/results.jsonl",
        f"evaluation/answers/nl_rx-{step_name(step)}.jsonl",
    }


def test_the_state_that_is_further_counts(study_with_values):
    study = study_with_values(VALUES)
    before, _ = render_report(study, page=False)
    run, record = study / "arm1-1", record_path(study, "arm1-1")
    write_record(run, record)
    (run / "status.json").write_text(json.dumps({"status": "running", "step": 3, "reason": ""}))
    assert render_report(study, page=False)[0] == before  # the record is finished
    (run / "status.json").write_text(json.dumps({"status": "finished", "step": 6, "reason": ""}))
    results = run / "evaluation" / "results.jsonl"
    line = json.loads(results.read_text())
    results.write_text(results.read_text() + json.dumps(line | {"step": 3, "metrics": {"exact": 0.1}}) + "\n")
    runs = {run.folder.name: run for run in read_comparison([study], None, None).runs}
    assert len(runs["arm1-1"].results) == 2 and runs["arm1-1"].record is None  # the directory has more results


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("path", "is not a file of the run"),
        ("link", "is not a file of the run"),
        ("other file", "is not a file of the run"),
        ("other run", "is not a file of the run"),
        ("incomplete", "it lacks metrics.jsonl"),
        ("unfinished", "is not the record of a finished run"),
        ("truncated", ""),
        ("not an archive", ""),
        ("not a tar file", ""),
    ],
)
def test_damaged_and_foreign_records_are_one_line(study_with_values, kind, reason, tmp_path):
    study = study_with_values(VALUES)
    record = record_path(study, "arm0-1")
    pack(study)
    entries = members(record)
    status = entries["arm0-1/status.json"]
    if kind == "path":
        rewrite(record, entries | {"arm0-1/evaluation/answers/../../../../outside.jsonl": b""})
    elif kind == "link":
        rewrite(record, entries | {"arm0-1/status.json": b""}, type=tarfile.SYMTYPE, linkname="/etc/hostname")
    elif kind == "other file":
        rewrite(record, entries | {"arm0-1/model.bin": b""})
    elif kind == "other run":
        shutil.copyfile(record_path(study, "arm0-2"), record)
    elif kind == "incomplete":
        rewrite(record, {name: data for name, data in entries.items() if not name.endswith("metrics.jsonl")})
    elif kind == "unfinished":
        rewrite(record, entries | {"arm0-1/status.json": status.replace(b"finished", b"resumable")})
    elif kind == "truncated":
        record.write_bytes(record.read_bytes()[:-400])
    elif kind == "not an archive":
        record.write_bytes(b"<<<<<<< HEAD")
    else:
        record.write_bytes(lzma.compress(b"no tar file" * 100))
    with pytest.raises(UserError) as raised:
        read_record(record)
    assert re.fullmatch(
        rf"cannot read {record}: .*{reason}.*; restore the file, or delete it to have the run repeated",
        str(raised.value),
    )
    with pytest.raises(UserError, match="cannot read"):
        read_comparison([study], None, None)
    record.unlink()
    assert "No verdict yet: 1 of 6 runs is missing" in render_report(study, page=False)[0]
