"""The init command: its files pass the checks of the dry run and prepare, and its errors are one line."""

import json
import sqlite3
from pathlib import Path

import pytest
import yaml

from data_prep.nlrx_grammar import generate
from pretrain.config import load_config
from pretrain.data.corpus import Corpus, count_in_corpus
from pretrain.init.budget import MOST_EPOCHS, choose_batch, count_shape, model_shape, rounded
from pretrain.planning.speed import Machine
from pretrain.training.dry_run import checked_plan
from tests.commands import run_command

INIT = ["python", "launcher/init.py"]
CPU = Machine("cpu", 2)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int, split: str = "train") -> list[tuple[str, str]]:
    return [generate(0, split, index) for index in range(count)]


def init(data: Path, output: Path, *options: str) -> tuple[str, dict]:
    """Run the command; return its output and the values of the file."""
    done = run_command([*INIT, str(data), "-o", str(output), *options])
    return done.stdout, yaml.safe_load(output.read_text())


def write_regexes(folder: Path) -> None:
    for split in ("train", "test"):
        rows = [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
            for a, b in pairs(80, split)
        ]
        write_lines(folder / f"{split}.jsonl", rows)


def write_queries(folder: Path) -> None:
    with sqlite3.connect(folder / "pets.sqlite") as database:
        database.execute("CREATE TABLE dogs (name TEXT, age INT)")
    for split, first in (("train", 0), ("test", 100)):
        rows = [
            {"question": f"Which dogs are older than {age} years?", "sql": f"SELECT name FROM dogs WHERE age > {age}"}
            for age in range(first, first + 60)
        ]
        write_lines(folder / f"{split}.jsonl", rows)


def write_labels(folder: Path) -> None:
    for split in ("train", "test"):
        rows = [
            "review,topic",
            *(f'"{a}",{("sport", "music", "law")[i % 3]}' for i, (a, _) in enumerate(pairs(80, split))),
        ]
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")


def write_numbers(folder: Path) -> None:
    for split, first in (("train", 0), ("test", 500)):
        rows = [
            {"question": f"What is the sum of {i} and 5?", "answer": f"It is {i} + 5.\n#### {i + 5}"}
            for i in range(first, first + 60)
        ]
        write_lines(folder / f"{split}.jsonl", rows)


def write_texts(folder: Path) -> None:
    for split in ("train", "test"):
        rows = [{"en": f"the {a} is here", "upper": f"the {a} is not here".upper()} for a, _ in pairs(60, split)]
        write_lines(folder / f"{split}.jsonl", rows)


@pytest.mark.parametrize(
    ("write", "tasks"),
    [
        (write_regexes, ["nl_rx"]),
        (write_queries, ["spider"]),
        (write_labels, ["rotten_tomatoes"]),
        (write_numbers, ["gsm8k"]),
        (write_texts, ["text", "retrieval"]),
    ],
)
def test_the_file_passes_the_dry_run_with_a_task_for_its_target(tmp_path, write, tasks):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder)
    printed, values = init(folder, tmp_path / "new" / "mine.yaml")
    assert [task["name"] for task in values["evaluation"]["tasks"]] == tasks
    views = list(values["data"]["sources"][0]["views"])
    assert values["name"] == "mine" and values["data"]["views"] == views and len(views) == 2
    plan = checked_plan(load_config(tmp_path / "new" / "mine.yaml"), 2)
    assert f"{plan.total:,} parameters" in printed
    assert "training takes about" in printed and "launcher/evaluate.py runs/mine" in printed
    assert max(map(len, (tmp_path / "new" / "mine.yaml").read_text().splitlines())) <= 120 + len(str(folder))


def test_fifty_rows_are_prepared_by_the_printed_command(tmp_path):
    data = write_lines(tmp_path / "rows.jsonl", [{"text": a, "code": b} for a, b in pairs(50)])
    printed, values = init(data, tmp_path / "mine.yaml")
    assert "check: 50 records" in printed and "evaluation" not in values and values["train"]["epochs"] == MOST_EPOCHS
    text = (tmp_path / "mine.yaml").read_text()
    assert "# check: the data have no test split" in text and "#     - {name: nl_rx, test: TEST_FILE}" in text
    corpus = tmp_path / "corpus"
    run_command(["python", "-m", "data_prep", str(tmp_path / "mine.yaml"), f"data.path={corpus}", "data.workers=1"])
    plan = run_command(["python", "launcher/run.py", str(tmp_path / "mine.yaml"), "--dry-run", f"data.path={corpus}"])
    assert "total FLOPs" in plan.stdout and "pairs" in plan.stdout


def test_without_a_test_split_training_rows_are_held_out(tmp_path):
    """The rows come from a CSV file whose columns are not named like the views."""
    rows = ["prompt text,regex pattern", *(f'"{a}","{b}"' for a, b in pairs(400)), *(f'"{a}",x' for a, _ in pairs(40))]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    printed, values = init(tmp_path / "rows.csv", tmp_path / "mine.yaml")
    held_out = tmp_path / "mine-test.jsonl"
    test = [json.loads(line)["prompt text"] for line in held_out.read_text().splitlines()]
    assert [task["test"] for task in values["evaluation"]["tasks"]] == [str(held_out)] * len(
        values["evaluation"]["tasks"]
    )
    assert 40 <= len(test) <= 44 and values["data"]["decontaminate"] and f"and {held_out}; the conf" in printed
    assert f"python launcher/generate.py runs/mine {values['data']['views'][0].upper()}\n" in printed
    assert f"python launcher/search.py runs/mine --index {held_out} " in printed
    assert "The data have no test split" in (tmp_path / "mine.yaml").read_text()
    corpus = tmp_path / "corpus"
    run_command(["python", "-m", "data_prep", str(tmp_path / "mine.yaml"), f"data.path={corpus}", "data.workers=1"])
    train = Corpus(corpus, "train")
    assert len(train) > 200 and not any(count_in_corpus(train, test))
    again = run_command([*INIT, str(tmp_path / "rows.csv"), "-o", str(tmp_path / "mine.yaml"), "--force"])
    assert again.returncode == 0 and len(held_out.read_text().splitlines()) == len(test)
    (tmp_path / "mine.yaml").unlink()
    done = run_command([*INIT, str(tmp_path / "rows.csv"), "-o", str(tmp_path / "mine.yaml")], check=False)
    assert done.returncode == 2 and "mine-test.jsonl exists" in done.stderr and not (tmp_path / "mine.yaml").exists()


def test_all_test_rows_of_labels_are_scored(tmp_path):
    """A file that is sorted by label would otherwise be scored on one label."""
    for split, count in (("train", 60), ("test", 600)):
        rows = [{"review": f"{text} {number}", "label": "Good"} for number, (text, _) in enumerate(pairs(count))]
        write_lines(tmp_path / "data" / f"{split}.jsonl", [row | {"label": "Bad"} for row in rows[::2]] + rows[1::2])
    printed, values = init(tmp_path / "data", tmp_path / "mine.yaml")
    (task,) = values["evaluation"]["tasks"]
    assert task["name"] == "rotten_tomatoes" and "rows" not in task
    assert "compare with objective.name=next_token" in printed and "launcher/search.py" not in printed


def test_test_rows_leave_the_validation_split_its_fraction(tmp_path):
    """The preparation draws validation records of labels and of plain documents by the hash of the context, too."""
    rows = [{"text": f"{text} in line {number}"} for number, (text, _) in enumerate(pairs(1000))]
    _, values = init(write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "mine.yaml")
    corpus = tmp_path / "corpus"
    run_command(["python", "-m", "data_prep", str(tmp_path / "mine.yaml"), f"data.path={corpus}", "data.workers=1"])
    expected = values["data"]["validation_fraction"] * len(rows)
    assert len(Corpus(corpus, "validation")) == pytest.approx(expected, abs=4 * expected**0.5)


def test_one_column_has_an_objective_without_pairs(tmp_path):
    data = write_lines(tmp_path / "rows.jsonl", [{"body": f"{a} the {b}"} for a, b in pairs(60)])
    _, values = init(data, tmp_path / "mine.yaml")
    assert values["data"]["views"] == ["text"] and values["objective"]["name"] == "semantic_tube"


def test_a_task_that_does_not_accept_its_rows_is_a_comment(tmp_path):
    write_lines(tmp_path / "data" / "train.jsonl", [{"text": a, "code": b} for a, b in pairs(60)])
    write_lines(tmp_path / "data" / "test.jsonl", [{"words": a} for a, _ in pairs(60, "test")])
    _, values = init(tmp_path / "data", tmp_path / "mine.yaml")
    assert "evaluation" not in values
    assert "the task does not accept its rows" in (tmp_path / "mine.yaml").read_text()


def test_rows_that_are_not_valid_are_dropped_with_a_comment(tmp_path):
    data = write_lines(tmp_path / "rows.jsonl", [{"text": a, "code": b} for a, b in pairs(60)])
    data.write_bytes(data.read_bytes() + b'{"text": "caf\xe9", "code": "x"}\n')
    printed, values = init(data, tmp_path / "mine.yaml")
    assert values["data"]["on_malformed"] == "drop" and "check: 1 row is not valid" in printed


def test_an_existing_file_is_kept_unless_force_is_given(tmp_path):
    output = tmp_path / "mine.yaml"
    output.write_text("name: old\n")
    data = write_lines(tmp_path / "rows.jsonl", [{"text": a, "code": b} for a, b in pairs(60)])
    done = run_command([*INIT, str(data), "-o", str(output)], check=False)
    assert done.returncode == 2 and "exists" in done.stderr and output.read_text() == "name: old\n"
    assert init(data, output, "--force")[1]["name"] == "mine"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "caf\xe9"}\n' * 30, "cannot be read"),
        (b"", "has no rows"),
        (b'{"a": 1}\n' * 30, "no column has text"),
    ],
)
def test_unusable_data_are_one_line_and_write_nothing(tmp_path, content, expected):
    (tmp_path / "rows.jsonl").write_bytes(content)
    done = run_command([*INIT, str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "mine.yaml")], check=False)
    assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "mine.yaml").exists()


def test_shapes_are_the_ones_of_the_examples():
    """The first shapes are the ones of configs/models, whose parameters the dry run counts."""
    for width, name in ((144, "llama_1m"), (192, "llama_2m")):
        shape = yaml.safe_load(Path(f"configs/models/{name}.yaml").read_text())
        del shape["max_position_embeddings"]
        assert model_shape(width, 4, 6) == shape
    assert count_shape(model_shape(144, 4, 6), 512).total == 1_070_496


def test_batches_divide_among_the_processes():
    for flops, positions, length in ((1e9, 1e3, 256), (1e13, 1e6, 256), (1e15, 1e8, 2048)):
        rows, micro_rows = choose_batch(flops, positions, length, CPU)
        assert rows % (micro_rows * CPU.processes) == 0 and micro_rows >= 1
    assert [rounded(steps) for steps in (0.3, 1, 4, 7, 34, 199, 2000)] == [1, 1, 2, 5, 20, 100, 2000]
