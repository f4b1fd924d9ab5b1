"""Measurements of pages in a real browser: Chromium or Chrome, if one is installed."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.processes import TIMEOUT

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, PROGRAMS)), None)
WIDTHS = (400, 1280)
"""Widths of the window of a phone and of a laptop, in pixels."""
SMALLEST_TEXT = 8
"""Smallest size at which the text of a chart can be read, in pixels."""

needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser is installed (none of {', '.join(PROGRAMS)})")

SCRIPT = """
<script>
addEventListener("load", () => {
  const isDrawn = (element) => element.getBoundingClientRect().width > 0 && element.getBoundingClientRect().height > 0
  const charts = [...document.querySelectorAll("figure > svg")], images = [...document.images]
  const textSizes = charts.flatMap((chart) => [...chart.querySelectorAll("text")].map(
    (text) => parseFloat(getComputedStyle(text).fontSize) * chart.getScreenCTM().a))
  parent.postMessage({
    window: innerWidth,
    page: document.documentElement.scrollWidth,
    charts: charts.filter(isDrawn).length,
    smallest_text: textSizes.length ? Math.min(...textSizes) : null,
    images: images.filter(isDrawn).length,
    broken_images: images.filter((image) => image.naturalWidth === 0).length,
  }, "*")
})
</script>
"""
"""Script that measures the page to which it is added, and sends the result to the page of FRAMES."""
FRAMES = """<!doctype html>
<pre></pre>
<script>
const measures = []
onmessage = (event) => {
  measures.push(event.data)
  document.querySelector("pre").textContent = JSON.stringify(measures)
}
</script>
"""
"""Page for frames, which show a page as in windows of several widths. The browser's own window is at least 500 wide."""


def measure(page: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Open a page in windows of all WIDTHS. Return its measures in each of them, and the messages of its scripts.

    A copy of the page with a script that measures it is written to the folder of the page.
    """
    assert BROWSER is not None
    copy, frames = (page.with_name(f"{name}-{page.name}") for name in ("measured", "frames"))
    copy.write_text(page.read_text() + SCRIPT)
    frame = f'<iframe src="{copy.name}" style="width: {{}}px; height: 1000px; border: 0"></iframe>\n'
    frames.write_text(FRAMES + "".join(map(frame.format, WIDTHS)))
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                BROWSER,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
                *(f"--user-data-dir={profile}", "--window-size=1400,1200", "--enable-logging=stderr"),
                *("--virtual-time-budget=5000", "--dump-dom", frames.as_uri()),
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    found = re.search(r"<pre>(.+)</pre>", done.stdout)
    assert found is not None, f"the page was not measured:\n{done.stdout[:2000]}\n{done.stderr[-2000:]}"
    measures = json.loads(html.unescape(found[1]))
    assert sorted(measured["window"] for measured in measures) == sorted(WIDTHS)
    return measures, re.findall(r"CONSOLE.*", done.stderr)


def assert_readable(page: Path) -> dict[str, Any]:
    """Return the measures of a page in the last window.

    Fails if it is wider than a window, if charts or images are missing or too small to read, or if a script fails.
    """
    measures, messages = measure(page)
    assert not messages, f"messages: {messages}"
    for measured in measures:
        problems = {
            "page": measured["page"] > measured["window"],
            "charts": measured["charts"] != len(re.findall(r"<figure[^>]*><svg", page.read_text())),
            "smallest_text": (measured["smallest_text"] or SMALLEST_TEXT) < SMALLEST_TEXT,
            "broken_images": measured["broken_images"] > 0,
        }
        assert not any(problems.values()), f"{[name for name, found in problems.items() if found]}: {measured}"
    return measures[-1]
