"""Real data for tests, where a machine has them, and the three ways to answer that every score is tried on."""

import json
import os
from pathlib import Path

import pytest

from data_prep.config import JsonSource
from data_prep.task_rows import Row, read_rows
from data_prep.tasks import public_row_format
from pretrain.tasks.scoring import Answer

DATA = Path(os.environ.get("JEPA_TEST_DATA", "/nonexistent"))
VIEWS = ("text", "code")


def real_rows(name, task="", rows=None) -> list[Row]:
    """Rows of a file of real data; skips the test where the machine has none."""
    if not (DATA / name).exists():
        pytest.skip(f"no real data: JEPA_TEST_DATA names no folder with {name}")
    return read_rows(JsonSource(type="json", path=str(DATA / name)), VIEWS, "task.test", rows, public_row_format(task))


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gold_answers(texts) -> list[Answer]:
    return [Answer(text, True) for text in texts]


def empty_answers(texts) -> list[Answer]:
    return [Answer("", True) for _ in texts]


def rotated(texts) -> list[str]:
    """Every answer moved on by one row."""
    return [*texts[1:], texts[0]]
