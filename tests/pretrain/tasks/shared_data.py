"""Real data for tests if the machine has it, and the three kinds of answers that each score is tested with."""

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
    """Return rows of a file of real data; skip the test if the machine lacks the file."""
    if not (DATA / name).exists():
        pytest.skip(f"no real data: {name} is missing; set JEPA_TEST_DATA to its folder")
    return read_rows(JsonSource(type="json", path=str(DATA / name)), VIEWS, "task.test", rows, public_row_format(task))


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gold_answers(texts) -> list[Answer]:
    return [Answer(text, True) for text in texts]


def empty_answers(texts) -> list[Answer]:
    return [Answer("", True) for _ in texts]


def rotated(texts) -> list[str]:
    """Return the answers shifted by one row."""
    return [*texts[1:], texts[0]]
