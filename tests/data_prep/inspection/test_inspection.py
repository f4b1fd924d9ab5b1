"""The inspection of data in all formats: splits, columns, views and lengths, and one-line errors."""

import csv
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.inspection import raw_rows
from data_prep.inspection.columns import describe_columns
from data_prep.inspection.find import find_splits
from data_prep.inspection.languages import language_of
from data_prep.inspection.look import inspect
from data_prep.nlrx_grammar import generate
from data_prep.utils.console import UserError
from tests.commands import ROOT
from tests.processes import TIMEOUT

NAMED = {"question": "question", "regex": "regex"}


def pairs(count: int, split: str = "train") -> list[dict]:
    generated = (generate(0, split, index) for index in range(count))
    return [{"question": text, "regex": code} for text, code in generated]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_arrow(path: Path, rows: list[dict]) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_array(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("name", "write", "kind"),
    [
        ("rows.jsonl", write_lines, "json"),
        ("rows.json", write_array, "json"),
        ("rows.csv", write_csv, "csv"),
        ("rows.tsv", write_csv, "csv"),
        ("rows.parquet", write_parquet, "parquet"),
        ("rows.arrow", write_arrow, "arrow"),
    ],
)
def test_all_formats_of_a_file_lead_to_the_same_views(tmp_path, name, write, kind):
    found = inspect(str(write(tmp_path / name, pairs(120))))
    assert found.found.splits == {"train": {"type": kind, "path": str(tmp_path / name)}}
    assert found.choice.mapping == NAMED and found.choice.target.content == "regex"
    assert [column.described for column in found.columns] == ["English", "regex"]
    assert found.records == [(row["question"], row["regex"]) for row in pairs(120)]
    assert found.samples["train"].total == 120 and found.lengths.shape == (found.total, 2)


def test_the_names_of_files_decide_their_splits(tmp_path):
    for name in ("x_train", "x_dev", "x_test"):
        write_lines(tmp_path / f"{name}.jsonl", pairs(40, name[2:].replace("dev", "validation")))
    write_array(tmp_path / "tables.json", [{"schema": []}])
    found = inspect(str(tmp_path))
    paths = {split: Path(values["path"]).name for split, values in found.found.splits.items()}
    assert paths == {"train": "x_train.jsonl", "validation": "x_dev.jsonl", "test": "x_test.jsonl"}
    assert found.found.notes == ["not used, because no split is in the name: tables.json"]
    single = find_splits(str(tmp_path / "x_train.jsonl"))
    assert list(single.splits) == ["train"] and "name the folder to use its splits" in single.notes[0]


def test_other_formats_with_splits_are_read_as_on_the_hub(tmp_path):
    write_csv(tmp_path / "train.csv", pairs(40))
    write_csv(tmp_path / "test.csv", [*pairs(30, "test"), *pairs(3)])
    found = inspect(str(tmp_path))
    assert found.found.splits["train"] == {"type": "hub", "path": str(tmp_path), "hub_split": "train"}
    assert len(found.records) == 40 and found.seen_contexts("test") == 3


def test_the_names_of_folders_decide_the_splits_of_their_files(tmp_path):
    for number, name in enumerate(("train/a", "train/b", "test/train_like")):
        rows = [row | {"question": f"{number} {row['question']}"} for row in pairs(40)]
        write_lines(tmp_path / "shards" / f"{name}.jsonl", rows)
        if number:
            write_lines(tmp_path / "single" / f"{name}.jsonl", rows)
    for folder, count in (("shards", 80), ("single", 40)):
        found = inspect(str(tmp_path / folder))
        assert len(found.records) == count and not any(record[0].startswith("2 ") for record in found.records)
        assert {record[0][:2] for record in found.records_of("test")} == {"2 "}
    (tmp_path / "shards" / "test" / "train_like.jsonl").rename(tmp_path / "shards" / "test.jsonl")
    with pytest.raises(UserError, match=r"do not find test\.jsonl: move the files of each split into a folder"):
        find_splits(str(tmp_path / "shards"))


def write_documents(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n\n".join(f"{name} {row['question']}" for row in pairs(30)))


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        (["train.txt"], ["dev.txt"], ["test.txt"]),
        (["train/a.txt", "train/b.txt"], ["valid/a.txt"], ["test/a.txt", "test/b.txt"]),
        (["train_1.txt", "train_12.txt"], ["val_1.txt", "val_2.txt"], ["test_1.txt"]),
    ],
)
def test_text_files_of_other_splits_are_not_training_data(tmp_path, train, validation, test):
    write_documents(tmp_path, *train, *validation, *test)
    found = inspect(str(tmp_path))
    assert {record[0].split()[0] for record in found.records} == set(train)
    assert {record[0].split()[0] for record in found.records_of("validation")} == set(validation)
    assert len(found.records) == 30 * len(train)
    assert "test" not in found.found.splits and test[0] in found.found.notes[0]


def test_text_files_are_training_data_with_a_note_if_a_name_has_no_split(tmp_path):
    write_documents(tmp_path, "train.txt", "test.txt", "book.txt")
    found = find_splits(str(tmp_path))
    assert found.splits == {"train": {"type": "text", "path": str(tmp_path)}}
    assert "all files are training data, also test.txt" in found.notes[0]


def test_text_files_of_a_split_must_be_named_by_a_pattern(tmp_path):
    write_documents(tmp_path, "a/train.txt", "b/train.txt", "b/test.txt")
    with pytest.raises(UserError, match=r"move the files of each split into a folder: a/train\.txt, b/train\.txt"):
        find_splits(str(tmp_path))


def test_without_a_name_for_training_all_files_are_training_data_with_a_note(tmp_path):
    write_lines(tmp_path / "a_test.jsonl", pairs(30))
    write_lines(tmp_path / "b.jsonl", pairs(30))
    found = inspect(str(tmp_path))
    assert len(found.records) == 60 and found.found.notes == [
        "all files are training data, because none has train in its name"
    ]


def test_the_rows_of_a_partly_read_file_are_estimated_from_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_rows, "MOST_ROWS", 100)
    rows = [
        {"question": f"{row['question']} {number}", "regex": row["regex"]} for number, row in enumerate(pairs(1000))
    ]
    sample = inspect(str(write_lines(tmp_path / "rows.jsonl", rows))).samples["train"]
    assert len(sample.rows) == 100 and not sample.complete and sample.total == pytest.approx(1000, rel=0.2)


def test_only_the_columns_of_the_views_must_be_readable(tmp_path):
    """As in the preparation, which reads no other column of a Parquet or Arrow file."""
    rows = [row | {"image": b"\xff\xd8"} for row in pairs(60)]
    for found in (
        inspect(str(write_parquet(tmp_path / "rows.parquet", rows))),
        inspect(str(write_arrow(tmp_path / "rows.arrow", rows))),
    ):
        assert len(found.records) == 60 and not found.malformed and found.choice.mapping == NAMED
        assert "not used: image (bytes that are not UTF-8 text)" in found.choice.questions
    few = [{"question": row["question"].encode(), "regex": row["regex"]} for row in pairs(60)]
    few[7]["question"] = b"caf\xe9"
    found = inspect(str(write_parquet(tmp_path / "few.parquet", few)))
    [problem] = found.malformed
    assert "few.parquet:8: 'question' holds bytes that are not UTF-8" in problem and len(found.records) == 59
    assert found.samples["train"].total == 59
    for row in few[:5]:
        row["question"] = b"caf\xe9"
    with pytest.raises(UserError, match=r"10% of the rows of train cannot be read.*iconv"):
        inspect(str(write_parquet(tmp_path / "more.parquet", few)))


@pytest.mark.parametrize("name", ["q{1}", "messages.user"])
def test_a_column_whose_name_has_another_meaning_is_an_error(tmp_path, name):
    path = write_csv(tmp_path / "rows.csv", [{name: row["question"], "answer": row["regex"]} for row in pairs(60)])
    with pytest.raises(UserError, match=f"the column '{re.escape(name)}' cannot become a view.*: rename the column"):
        inspect(str(path))


def test_a_csv_file_without_a_header_line_is_a_question(tmp_path):
    question = "the names of the columns look like values"
    path = write_csv(tmp_path / "rows.csv", [row for row in pairs(300) if "{" not in row["regex"]])
    assert not any(question in one for one in inspect(str(path)).choice.questions)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert any(question in one for one in inspect(str(path)).choice.questions)
    survey = [
        {"What do you think about it?": f"I think that {row['question']}", "How much, from 1 to 5?": number % 5}
        for number, row in enumerate(pairs(60))
    ]
    choice = inspect(str(write_csv(tmp_path / "survey.csv", survey))).choice
    assert not any(question in one for one in choice.questions)


def test_the_reason_for_the_views_is_the_true_one(tmp_path):
    by_content = chosen(tmp_path, [{"Antwort": row["regex"], "Frage": row["question"]} for row in pairs(60)])
    assert by_content.mapping == {"Frage": "Frage", "Antwort": "Antwort"}
    assert by_content.reason == "chosen by the contents of the columns: Antwort has regexes"
    assert any("swap them if Antwort predicts Frage" in question for question in by_content.questions)
    by_name = chosen(tmp_path, [{"response": row["question"], "pattern": row["regex"]} for row in pairs(60)])
    assert by_name.mapping == {"pattern": "pattern", "response": "response"}
    assert by_name.reason == "chosen by the names of the columns" and not by_name.questions
    by_order = chosen(tmp_path, [{"a": row["question"], "b": f"the {row['question']}"} for row in pairs(60)])
    assert by_order.reason == "chosen by the order of the columns"


def test_folders_of_save_to_disk_are_read(tmp_path):
    import datasets

    train, test = (datasets.Dataset.from_list(pairs(40, split)) for split in ("train", "test"))
    train.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "saved")
    assert inspect(str(tmp_path / "plain")).found.splits == {"train": {"type": "hub", "path": str(tmp_path / "plain")}}
    found = inspect(str(tmp_path / "saved"))
    assert [values["hub_split"] for values in found.found.splits.values()] == ["train", "test"]
    assert found.choice.mapping == NAMED and found.samples["test"].total == 40


HUB = """
import json, os, sys
from tests.data_prep.sources.hub_checks import OLD, make_files
from tests.data_prep.sources.hub_server import serve
with serve({OLD: make_files("dogs")}, {"main": OLD}) as hub:
    os.environ["HF_ENDPOINT"] = hub.url
    from data_prep.inspection.look import inspect
    found = inspect("owner/name")
    print(json.dumps([found.found.splits, found.choice.mapping, len(found.records)]))
"""


def test_a_data_set_of_the_hub_is_read_by_its_name(tmp_path):
    variables = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", HUB], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    splits, mapping, records = json.loads(done.stdout.splitlines()[-1])
    assert splits == {"train": {"type": "hub", "path": "owner/name"}} and records == 200
    assert mapping == {"text": "text", "code": "code"}


def chosen(tmp_path: Path, rows: list[dict]):
    return inspect(str(write_lines(tmp_path / "rows.jsonl", rows))).choice


def turns(*texts: str, names=("role", "content"), roles=("user", "assistant")) -> list[dict]:
    return [dict(zip(names, (roles[number % 2], text), strict=True)) for number, text in enumerate(texts)]


def test_conversations_are_recognised(tmp_path):
    rows = [{"messages": turns(row["question"], row["regex"])} for row in pairs(60)]
    assert chosen(tmp_path, rows).mapping == {"context": "messages.user", "target": "messages.assistant"}
    share = {"names": ("from", "value"), "roles": ("human", "gpt")}
    rows = [{"conversations": turns(row["question"], row["regex"], **share)} for row in pairs(60)]
    assert chosen(tmp_path, rows).mapping == {"context": "conversations.user", "target": "conversations.assistant"}
    several = [{"messages": turns(row["question"], "a", "b", row["regex"])} for row in pairs(60)]
    with pytest.raises(UserError, match="60 of 60 conversations have several turns"):
        chosen(tmp_path, several)


def test_system_prompts_are_used_if_they_differ(tmp_path):
    system = [[{"role": "system", "content": f"Answer in style {number % 7}"}] for number in range(60)]
    rows = [
        {"messages": [*first, *turns(row["question"], row["regex"])]}
        for first, row in zip(system, pairs(60), strict=True)
    ]
    assert chosen(tmp_path, rows).mapping["context"] == "{messages.system}\n{messages.user}"


def test_few_different_values_are_not_the_target_if_their_name_does_not_decide_it(tmp_path):
    """As in WordNet, whose rows have a part of speech, words and a gloss."""
    rows = [{"pos": "ab"[i % 2], "words": ["x"], "gloss": row["question"]} for i, row in enumerate(pairs(60))]
    choice = inspect(str(write_lines(tmp_path / "one.jsonl", rows))).choice
    assert choice.mapping == {"text": "gloss"} and choice.target.name == "gloss"
    assert any(question.startswith("not used: pos (few different values") for question in choice.questions)
    for row, other in zip(rows, pairs(60), strict=True):
        row["example"] = f"as in {other['question']}"
    choice = inspect(str(write_lines(tmp_path / "two.jsonl", rows))).choice
    assert choice.mapping == {"gloss": "gloss", "example": "example"}


@pytest.mark.parametrize(
    ("text", "label"), [("gloss", "sentiment"), ("gloss", "gold_label"), ("review", "topic"), ("text", "pos")]
)
def test_few_different_values_are_the_target_by_their_name_or_of_a_text_to_classify(tmp_path, text, label):
    rows = [{label: "ab"[i % 2], text: row["question"]} for i, row in enumerate(pairs(60))]
    assert inspect(str(write_lines(tmp_path / "rows.jsonl", rows))).choice.target.name == label


def test_a_label_is_the_target_and_equal_columns_are_joined(tmp_path):
    draw = random.Random(0)
    rows = [{"label": draw.randrange(2), "text_a": row["question"], "text_b": row["regex"]} for row in pairs(60)]
    choice = chosen(tmp_path, rows)
    assert choice.mapping == {"context": "{text_a}\n{text_b}", "target": "label"} and choice.target.content == "labels"
    assert any("to predict text_b from text_a instead" in question for question in choice.questions)


def test_an_ambiguous_choice_is_a_question(tmp_path):
    rows = [
        {"id": number, "alpha": row["question"], "beta": f"the {row['question']} of a dog", "tags": ["a", "b"]}
        for number, row in enumerate(pairs(60))
    ]
    choice = chosen(tmp_path, rows)
    assert choice.mapping == {"alpha": "alpha", "beta": "beta"} and choice.views == ("alpha", "beta")
    assert any("swap them if beta predicts alpha" in question for question in choice.questions)
    assert any("tags (lists of texts" in question for question in choice.questions)


def test_the_columns_of_spider_name_the_database(tmp_path):
    rows = [
        {
            "db_id": f"pets_{number % 5}",
            "question": f"How many dogs are in house {number}?",
            "query": f"SELECT {number}",
        }
        for number in range(60)
    ]
    assert chosen(tmp_path, rows).mapping["context"] == "For db_id:[{db_id}]\n\n{question}"


def test_lists_of_texts_become_records_of_several_views(tmp_path):
    rows = [{"same": [row["question"], row["question"].upper(), f"the {row['question']}"]} for row in pairs(60)]
    choice = chosen(tmp_path, rows)
    assert choice.mapping == "same" and choice.views == ("text_1", "text_2", "text_3")


def test_one_column_and_plain_files_are_documents(tmp_path):
    choice = chosen(tmp_path, [{"body": row["question"]} for row in pairs(60)])
    assert choice.mapping == {"text": "body"} and choice.views == ("text",)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "book.txt").write_text("\n\n".join(row["question"] for row in pairs(60)))
    found = inspect(str(folder))
    assert found.found.splits["train"]["separator"] == "" and len(found.records) == 60


def test_few_rows_have_a_vocabulary_that_can_be_trained(tmp_path):
    found = inspect(str(write_lines(tmp_path / "rows.jsonl", pairs(50))))
    assert 261 < found.vocabulary <= 512 and found.tokens > 0
    sums = [{"question": f"what is {i % 50} plus {i % 41}", "answer": str(i % 50 + i % 41)} for i in range(2000)]
    assert 261 < inspect(str(write_lines(tmp_path / "sums.jsonl", sums))).vocabulary < 320


def test_a_few_rows_that_are_not_utf_8_are_counted(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", pairs(100))
    path.write_bytes(path.read_bytes() + b'{"question": "caf\xe9", "regex": ".*"}\n')
    [problem] = inspect(str(path)).malformed
    assert f"{path}:101" in problem and "utf-8" in problem


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("latin.jsonl", b'{"text": "caf\xe9", "code": "a"}\n' * 30, "iconv -f ENCODING"),
        ("latin.csv", b"text,code\n" + b"caf\xe9,a\n" * 30, "latin.csv:2: not UTF-8"),
        ("latin.txt", b"caf\xe9\n\n" * 30, "latin.txt:1: not UTF-8"),
        ("empty.jsonl", b"", "has no rows"),
        ("semicolons.csv", b"text;code\n" + b"a dog;a\n" * 30, "divided by a semicolon"),
        ("tabs.csv", b"text\tcode\n" + b"a dog, or two\ta\n" * 30, r"divided by a tab.*\.tsv"),
        ("header.csv", "größe,code\n".encode("latin-1") + b"a dog,a\n" * 30, "not UTF-8.*iconv"),
        ("empty.csv", b"", "the first line must name the columns"),
        ("numbers.csv", b"a,b\n" + b"".join(b"%d,%d\n" % (i, 7 * i) for i in range(60)), "no column has text"),
        ("few.jsonl", b"".join(b'{"text": "a dog %d", "code": "dog %d"}\n' % (i, i) for i in range(9)), "has 9 usable"),
        ("rows.xlsx", b"PK", "unknown type of file"),
        ("rows.parquet", b"PAR1", "not a Parquet file"),
    ],
)
def test_unusable_files_are_one_line(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected) as raised:
        inspect(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_unusable_folders_are_one_line(tmp_path):
    with pytest.raises(UserError, match="has no data"):
        inspect(str(tmp_path))
    write_lines(tmp_path / "a.jsonl", pairs(30))
    write_csv(tmp_path / "a.csv", pairs(30))
    with pytest.raises(UserError, match="files of several types"):
        inspect(str(tmp_path))
    with pytest.raises(UserError, match="there is no file or folder"):
        inspect(str(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("English", "The end of the world is not near, and it was never in doubt."),
        ("German", "Das ist nicht der Anfang, und es wird auch nicht das Ende sein."),
        ("French", "Le chat est dans la maison et il ne veut pas sortir pour le moment."),
        ("Spanish", "El perro no se queda en la casa porque los gatos son como una familia."),
        ("Japanese", "これは日本語の文章です。"),
        ("Chinese", "这是一个中文句子。"),
        ("Cyrillic letters", "Это предложение на русском языке."),
        ("", "([a-z]).*[0-9]"),
    ],
)
def test_languages_are_recognised(language, text):
    assert language_of([text]) == language


def test_the_contents_of_columns_are_recognised():
    rows = [
        {
            "sql": f"SELECT a FROM b WHERE c = {i}",
            "number": f"{i:,}",
            "code": f"def f{i}(x):\n    return x",
            "pos": "ab"[i % 2],
        }
        for i in range(40)
    ]
    assert [column.content for column in describe_columns(rows)] == ["SQL", "numbers", "code", "labels"]
