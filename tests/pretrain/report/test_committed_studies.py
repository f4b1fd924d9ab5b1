"""The reports in docs/studies equal the reports that the project renders from the records next to them."""

from pathlib import Path

import pytest

from pretrain.report.arms import read_comparison
from pretrain.report.page import markdown
from pretrain.report.summary import summarize

STUDIES = sorted(path.parent for path in (Path(__file__).resolve().parents[3] / "docs" / "studies").glob("*/REPORT.md"))


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_report_matches_its_records(study):
    assert markdown(summarize(read_comparison([study], None, None))) == (study / "REPORT.md").read_text(
        encoding="utf-8"
    )
