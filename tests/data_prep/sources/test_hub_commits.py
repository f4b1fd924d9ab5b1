"""Hub revisions are resolved to commits, which the manifest records and a resumed preparation keeps."""

import json
import subprocess
import sys

import pytest

from tests.commands import ROOT
from tests.data_prep.sources.hub_checks import NEW, OLD, OTHER
from tests.processes import TIMEOUT


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """Results of `hub_checks`, which runs in one process because importing `datasets` takes seconds."""
    command = [sys.executable, "-m", "tests.data_prep.sources.hub_checks", str(tmp_path_factory.mktemp("hub"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "revision, commit, word",
    [("main", OLD, "old"), ("dev", OTHER, "other"), ("commit", NEW, "new"), ("moved", NEW, "new")],
)
def test_the_manifest_names_the_commit_that_was_read(results, revision, commit, word):
    result = results[revision]
    assert (result["commits"], result["records"], result["words"]) == ([commit], 200, [word])


def test_a_corpus_keeps_its_commit_when_the_branch_has_moved(results):
    assert results["main again"]["commits"] == [OLD] and "is already prepared" in results["main again"]["log"][-1]


def test_an_interrupted_preparation_resumes_with_its_commit(results):
    assert "error" in results["interrupted"]
    result = results["resumed"]
    assert any(line.startswith("resuming an interrupted preparation") for line in result["log"])
    assert (result["commits"], result["words"]) == ([OLD], ["old"])


def test_a_missing_revision_is_one_line(results):
    message = results["nowhere"]["error"]
    assert message.startswith("cannot open the data set owner/name (data.sources.0.path), split train: ")
    assert "nowhere" in message and "\n" not in message
