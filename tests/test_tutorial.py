"""The tutorial runs: its short form in every test run, with the same commands and less training."""

import json
from pathlib import Path

import pytest

from tests.commands import ROOT, run_command

CELLS = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())["cells"]


def run_tutorial(folder: Path, **environment: str) -> str:
    """Run the code of the tutorial as a program, and return what it prints."""
    program = folder / "tutorial.py"
    program.write_text("\n\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"))
    return run_command(
        ["python", str(program)], cold=True, MPLBACKEND="agg", TUTORIAL_FOLDER=str(folder / "runs"), **environment
    ).stdout


def test_the_short_form_runs(tmp_path):
    printed = run_tutorial(tmp_path, TUTORIAL="short")
    assert "passes --dry-run" in printed and "finished" in printed
    report = (tmp_path / "runs" / "does_it_help" / "REPORT.md").read_text()
    assert "# does_it_help" in report and "The arms were not tuned" in report
    queries = [
        json.loads(line)["description"] for line in (tmp_path / "runs/pairs/test.jsonl").read_text().splitlines()
    ]
    assert all(printed.count(query) >= 2 for query in queries[:3]), "an answer and a search for each query"


@pytest.mark.slow
def test_the_whole_tutorial_finds_the_expressions_of_unseen_descriptions(tmp_path):
    run_tutorial(tmp_path)
    results = tmp_path / "runs" / "does_it_help" / "llm_jepa-seed1" / "evaluation" / "results.jsonl"
    metrics = json.loads(results.read_text().splitlines()[-1])["metrics"]
    assert metrics["retrieval_at_1"] > 0.5 and (tmp_path / "runs" / "does_it_help" / "report.html").exists()
