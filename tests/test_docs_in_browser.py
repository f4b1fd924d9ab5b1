"""The pages of the documentation site in a real browser: nothing is cut off or missing, and no script fails."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.browser import assert_readable, needs_browser
from tests.commands import ROOT, environment

PAGES = ["README.md", "docs/index.md", "docs/using.md", "docs/tutorial.ipynb"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Return the folder of a site of some pages, without the reference of the code, which takes minutes to build."""
    folder = tmp_path_factory.mktemp("site")
    settings = {
        "extensions": "myst_parser,sphinx.ext.autodoc",
        "include_patterns": ",".join(PAGES),
        "suppress_warnings": "toc,myst.xref_missing",  # the other pages
    }
    options = [f"-D{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "sphinx", "-q", "-c", "docs", *options, ".", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@needs_browser
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_readable(page, site):
    assert_readable((site / page).with_suffix(".html"))


def test_the_site_shows_the_outputs_of_the_notebook(site):
    page = (site / "docs" / "tutorial.html").read_text()
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    types = Counter(next(iter(output.get("data", ["text"]))) for output in outputs)
    assert (
        page.count("<img") == types["image/png"] > 0 and page.count('<div class="highlight-text') == types["text"] > 0
    )
    assert types["text/markdown"] == 1 and "<th" in page and "does_it_help</strong>" in page
    assert set(types) == {"image/png", "text", "text/markdown"}


def test_the_outputs_of_the_notebook_do_not_show_the_machine():
    notebook = (ROOT / "docs" / "tutorial.ipynb").read_text()
    assert len(notebook) < 1_000_000
    assert not re.findall(r'[ "(\[](?:/\w+){2,}/?', notebook), "an absolute path"
