"""A study whose run directories are packed into one archive has the same report; unsafe archives are refused."""

import io
import shutil
import tarfile

import pytest

from data_prep.utils.console import UserError
from pretrain.report.arms import RUNS_ARCHIVE, read_comparison
from pretrain.report.page import markdown
from pretrain.report.summary import summarize


def render(study):
    return markdown(summarize(read_comparison([study], None, None)))


def test_packed_runs_have_the_same_report(study_with_values):
    study = study_with_values({"plain": {1: 0.5, 2: 0.6}, "pairs": {1: 0.7, 2: 0.9}})
    before = render(study)
    runs = [path for path in study.iterdir() if path.is_dir()]
    with tarfile.open(study / RUNS_ARCHIVE, "w:xz") as archive:
        for run in runs:
            archive.add(run, run.name)
    for run in runs:
        shutil.rmtree(run)
    assert render(study) == before


@pytest.mark.parametrize("kind", ["path", "link"])
def test_an_archive_that_leads_out_of_its_folder_is_refused(study_with_values, kind):
    study = study_with_values({"plain": {1: 0.5}, "pairs": {1: 0.7}})
    with tarfile.open(study / RUNS_ARCHIVE, "w:xz") as archive:
        member = tarfile.TarInfo("../outside.txt" if kind == "path" else "inside.txt")
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "../outside.txt"
        archive.addfile(member, io.BytesIO())
    with pytest.raises(UserError, match=f"cannot read .*{RUNS_ARCHIVE}.*restore the file"):
        read_comparison([study], None, None)


def test_a_corrupt_archive_is_one_line(study_with_values):
    study = study_with_values({"plain": {1: 0.5}, "pairs": {1: 0.7}})
    (study / RUNS_ARCHIVE).write_bytes(b"\xfd7zXZ\x00 not an archive")
    with pytest.raises(UserError, match=f"cannot read .*{RUNS_ARCHIVE}.*restore the file") as raised:
        read_comparison([study], None, None)
    assert "\n" not in str(raised.value)
