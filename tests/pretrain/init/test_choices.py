"""The choices of a first configuration for repeated records, test rows and tasks, in the process of the test."""

import json
from pathlib import Path

import pytest
import yaml

from data_prep.inspection.held_out import hold_out
from data_prep.inspection.look import inspect
from data_prep.nlrx_grammar import generate
from pretrain.init.main import write_config
from pretrain.init.task import choose_task


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int, split: str = "train") -> list[dict]:
    generated = (generate(0, split, index) for index in range(count))
    return [{"question": f"{index} {text}", "regex": code} for index, (text, code) in enumerate(generated)]


def written(data: Path, tmp_path: Path) -> tuple[dict, str]:
    """Return the values and the text of the configuration for data."""
    write_config(str(data), tmp_path / "mine.yaml", None, force=False)
    text = (tmp_path / "mine.yaml").read_text()
    return yaml.safe_load(text), text


def test_repeated_records_and_known_test_contexts_are_dropped(tmp_path):
    folder = tmp_path / "data"
    write_lines(folder / "train.jsonl", [*pairs(60), *pairs(7)])
    write_lines(folder / "test.jsonl", [*pairs(3), *({"question": f"x {i}", "regex": f"x{i}.*"} for i in range(30))])
    values, text = written(folder, tmp_path)
    assert values["data"]["deduplicate"] == "exact" and "7 training records are repeated" in text
    assert values["data"]["decontaminate"] is True and "3 test records have a context that is also in the" in text


def test_without_repetitions_nothing_is_dropped(tmp_path):
    folder = tmp_path / "data"
    write_lines(folder / "train.jsonl", pairs(60))
    write_lines(folder / "test.jsonl", [{"question": f"x {i}", "regex": f"x{i}.*"} for i in range(30)])
    values, _ = written(folder, tmp_path)
    assert "deduplicate" not in values["data"] and "decontaminate" not in values["data"]


def test_notes_on_files_and_columns_are_comments(tmp_path, capsys):
    """The questions are printed too."""
    rows = [row for row in pairs(400) if "{" not in row["regex"] and '"' not in row["question"]]
    data = tmp_path / "rows.csv"
    data.write_text("".join(f'"{row["question"]}","{row["regex"]}"\n' for row in rows))
    values, text = written(data, tmp_path)
    expected = "check: the names of the columns look like values"
    assert f"# {expected}" in text and expected in capsys.readouterr().out
    assert values["data"]["views"] == ["context", "target"]


@pytest.mark.parametrize("limit", [50, None])
def test_the_number_of_test_rows_is_limited(tmp_path, limit):
    write_lines(tmp_path / "train.jsonl", pairs(60))
    write_lines(tmp_path / "test.jsonl", pairs(51, "test"))
    [task] = choose_task(inspect(str(tmp_path)), limit, None).tasks
    assert task.get("rows") == limit
    [task] = choose_task(inspect(str(tmp_path)), 51, None).tasks
    assert "rows" not in task


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (["1", "2", "3", "4", "5"], {"name": "yelp"}),
        (["Good", "Bad"], {"name": "rotten_tomatoes"}),
        (["good", "bad"], {"name": "rotten_tomatoes", "label": "label_sentiment"}),
        (["0", "1"], {"name": "rotten_tomatoes", "label": "label_sentiment"}),
    ],
)
def test_labels_decide_the_task(tmp_path, labels, task):
    rows = [{"text": row["question"], "sentiment": labels[i % len(labels)]} for i, row in enumerate(pairs(60))]
    [chosen] = choose_task(inspect(str(write_lines(tmp_path / "rows.jsonl", rows))), None, "test.jsonl").tasks
    assert chosen == {**task, "test": "test.jsonl"}


def test_records_that_share_a_long_passage_with_a_test_row_are_counted(tmp_path):
    """All rows of a group share a passage, but their contexts differ."""
    passages = [
        f"{row['question']} and {other['question']}" for row, other in zip(pairs(80), pairs(80)[::-1], strict=True)
    ]
    rows = [
        {"question": f"{part} {passage} {passage[::-1]}", "regex": f"{number}.*{part}"}
        for number, passage in enumerate(passages)
        for part in ("first", "second", "third")
    ]
    held_out = hold_out(inspect(str(write_lines(tmp_path / "rows.jsonl", rows))))
    test = {row["regex"].partition(".")[0] for row in held_out.rows}
    assert held_out.similar >= 3 * len(test) - len(held_out.rows) > 0
    _, text = written(tmp_path / "rows.jsonl", tmp_path)
    assert f"check: {held_out.similar:,} training records share a long passage" in " ".join(
        text.replace("#", "").split()
    )
    different = [{"question": f"what is {i} plus {i}", "regex": f"{2 * i}.*"} for i in range(300)]
    assert hold_out(inspect(str(write_lines(tmp_path / "different.jsonl", different)))).similar == 0
