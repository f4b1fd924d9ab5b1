"""The page of a report in a real browser: in windows of a phone and a laptop, nothing is cut off, missing or tiny."""

import json
import re
import shutil
import signal
import urllib.request

import pytest

from tests.browser import assert_readable, needs_browser
from tests.commands import BackgroundCommand
from tests.pretrain.report.report_helpers import render_report
from tests.pretrain.report.test_committed_studies import STUDIES
from tests.pretrain.report.tiny_study import change_lines

pytestmark = needs_browser


@pytest.mark.parametrize(
    "text, problem",
    [
        ("<p>short</p>", None),
        ('<p style="width: 500px">wide</p>', "page"),
        ('<figure><svg></svg></figure><figure><svg style="width: 0"></svg></figure>', "charts"),
        ('<figure><svg viewBox="0 0 800 9"><text style="font-size: 9px">x</text></svg></figure>', "smallest_text"),
        ("<script>undefined.name</script>", "messages"),
        ('<img src="missing.png">', "broken_images"),
    ],
)
def test_each_problem_is_found(text, problem, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(f'<!doctype html><meta name="viewport" content="width=device-width">{text}')
    if problem is None:
        assert_readable(page)
    else:
        with pytest.raises(AssertionError, match=rf"^(\['{problem}'\]|{problem}):"):
            assert_readable(page)


def test_a_finished_study_is_readable(study, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(render_report(study)[1])
    assert assert_readable(page)["charts"] >= 8


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_the_page_of_a_committed_study_is_readable(study, tmp_path):
    page = tmp_path / "report.html"
    shutil.copy(study / "report.html", page)
    assert_readable(page)


def test_the_live_page_of_unfinished_runs_is_readable(study_with_values, tmp_path):
    study = study_with_values({"plain": {1: 0.7, 2: 0.7}, "pairs": {1: 0.7, 2: 0.7}})
    running = study / "arm1-2"
    (running / "status.json").write_text(json.dumps({"status": "running", "step": 3}))
    lines = (running / "metrics.jsonl").read_text().splitlines(keepends=True)
    (running / "metrics.jsonl").write_text("".join(lines[: len(lines) // 2]))
    change_lines(running / "evaluation" / "results.jsonl", lambda line: line.update(step=3))
    server = BackgroundCommand(["python", "launcher/report.py", str(study), "--live", "0"], tmp_path / "log.txt")
    try:
        server.wait_until(lambda: "shows the report" in server.log.read_text(), "the address")
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", server.log.read_text())
        page, message = tmp_path / "live.html", tmp_path / "message.html"
        page.write_bytes(urllib.request.urlopen(url).read())
        (study / "study.json").write_text("{")
        message.write_bytes(urllib.request.urlopen(url).read())
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 0
    finally:
        server.kill()
    assert "No verdict yet" in page.read_text() and "study.json" in message.read_text()
    assert_readable(message)
    assert assert_readable(page)["charts"] >= 3
