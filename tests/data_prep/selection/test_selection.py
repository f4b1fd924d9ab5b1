"""Tests of the selection of records: duplicates, contamination with test rows, and filters."""

import json
import random

import pytest

from data_prep.config import EvaluationFiles, JsonSource, TaskTest, evaluation_tests
from data_prep.pipeline import prepare
from data_prep.tokenizer import Tokenizer
from data_prep.utils.console import UserError
from tests.small_corpora import data_config, json_source, split_rows, task_tests


def texts_of(folder, split: str = "train") -> list[tuple[str, str]]:
    decode = Tokenizer.load(folder / "tokenizer").decode
    return [(decode(text), decode(code)) for text, code in split_rows(folder, split)]


def pair(row: dict[str, str]) -> tuple[str, str]:
    return row["text"], row["code"]


@pytest.fixture
def with_duplicates(write_jsonl, pairs, tmp_path) -> list[list[dict]]:
    """Rows of three files, with many rows twice or more, within a file and across files."""
    rng = random.Random(0)
    rows = pairs(200)
    files = [rng.choices(rows, k=150) for _ in range(3)]
    for number, file_rows in enumerate(files):
        write_jsonl(tmp_path / f"{number}.jsonl", file_rows)
    return files


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_of_equal_records_is_kept(with_duplicates, tmp_path, workers):
    sources = [json_source(tmp_path / f"{number}.jsonl") for number in range(3)]
    manifest = prepare(data_config(tmp_path / "out", *sources, sequence_length=512, workers=workers))
    all_pairs = [pair(row) for file_rows in with_duplicates for row in file_rows]
    assert texts_of(tmp_path / "out") == list(dict.fromkeys(all_pairs))
    assert manifest["dropped"]["duplicate"]["count"] == len(all_pairs) - len(set(all_pairs))
    seen = set()
    locations = []
    for number, file_rows in enumerate(with_duplicates):
        for line, row in enumerate(file_rows, 1):
            if pair(row) in seen:
                locations.append(f"{tmp_path / f'{number}.jsonl'}:{line}")
            seen.add(pair(row))
    assert [first.partition(": ")[0] for first in manifest["dropped"]["duplicate"]["first"]] == locations[:5]


def test_records_of_test_sources_are_kept_and_their_training_duplicates_dropped(with_duplicates, tmp_path):
    sources = [
        json_source(tmp_path / f"{number}.jsonl", split=split)
        for number, split in enumerate(("train", "validation", "test"))
    ]
    prepare(data_config(tmp_path / "out", *sources, sequence_length=512))
    train, validation, test = ([pair(row) for row in file_rows] for file_rows in with_duplicates)
    unique = dict.fromkeys
    assert texts_of(tmp_path / "out", "test") == list(unique(test))
    assert texts_of(tmp_path / "out", "validation") == [row for row in unique(validation) if row not in test]
    assert texts_of(tmp_path / "out") == [row for row in unique(train) if row not in test and row not in validation]


def test_deduplicate_none_keeps_all_records(with_duplicates, tmp_path):
    manifest = prepare(
        data_config(tmp_path / "out", json_source(tmp_path / "0.jsonl"), sequence_length=512, deduplicate="none")
    )
    assert texts_of(tmp_path / "out") == [pair(row) for row in with_duplicates[0]] and manifest["dropped"] == {}


def test_records_that_differ_in_one_view_are_not_duplicates(write_jsonl, tmp_path):
    rows = [
        {"text": "a b", "code": "c d"},
        {"text": "a b", "code": "d e"},
        {"text": "b c", "code": "c d"},
        {"text": "a", "code": "b c d"},
        {"text": "a b", "code": "c d"},
    ]
    prepare(
        data_config(
            tmp_path / "out", json_source(write_jsonl(tmp_path / "a.jsonl", rows)), tokenizer={"vocab_size": 295}
        )
    )
    assert texts_of(tmp_path / "out") == [pair(row) for row in rows[:4]]


LEAK = "how many of the dogs in the town of that name were sorted by the size of their größe at the end of the year"


@pytest.fixture
def leaky(write_jsonl, pairs, tmp_path) -> tuple[dict, list[TaskTest], list[dict]]:
    """A source with four contaminated rows, the tests of the task that they leak from, and the clean rows."""
    test = pairs(30, seed=7)
    clean = [
        {
            "text": f"what is {row['text']} number {number}",
            # Most rows have the target of a test row.
            "code": test[number % 30]["code"] if number % 5 else row["code"],
        }
        for number, row in enumerate(pairs(100))
    ]
    leaked = [
        {"text": test[3]["text"].upper() + " ?!", "code": "another answer"},
        {"text": test[4]["text"], "code": test[4]["code"]},
        {"text": f"So I asked: {LEAK}; and he said", "code": "nothing"},
        {"text": "of", "code": f"what they asked, {LEAK}"},
    ]
    path = write_jsonl(tmp_path / "test.jsonl", [*test, {"text": LEAK, "code": "4"}])
    source = json_source(write_jsonl(tmp_path / "train.jsonl", clean + leaked))
    return source, task_tests(path), clean


def test_records_with_a_test_context_are_dropped(leaky, tmp_path):
    source, tests, clean = leaky
    manifest = prepare(data_config(tmp_path / "out", source, sequence_length=512), tests)
    assert texts_of(tmp_path / "out") == [pair(row) for row in clean]
    dropped = manifest["dropped"]["contaminated"]
    assert dropped["count"] == 4 and all("the test context" in location for location in dropped["first"])
    assert [location.partition(": ")[0] for location in dropped["first"]] == [
        f"{tmp_path / 'train.jsonl'}:{line}" for line in (101, 102, 103, 104)
    ]
    assert str(tmp_path / "test.jsonl") in manifest["settings"]["files"]


def test_contaminated_records_are_kept_if_configured_or_in_a_test_source(leaky, tmp_path):
    source, tests, clean = leaky
    prepare(data_config(tmp_path / "kept", source, sequence_length=512, decontaminate=False), tests)
    assert len(texts_of(tmp_path / "kept")) == len(clean) + 4
    tokenizer = {"path": str(tmp_path / "kept" / "tokenizer")}
    prepare(
        data_config(tmp_path / "test", {**source, "split": "test"}, sequence_length=512, tokenizer=tokenizer), tests
    )
    assert len(texts_of(tmp_path / "test", "test")) == len(clean) + 4


def test_the_command_reads_the_tests_of_the_configured_tasks(leaky, tmp_path, run, run_expecting_user_error):
    source, tests, clean = leaky
    config = tmp_path / "run.yaml"
    config.write_text(
        json.dumps(
            {
                "name": "x",
                "data": {
                    "path": str(tmp_path / "out"),
                    "sources": [source],
                    "tokenizer": {"vocab_size": 340},
                    "sequence_length": 512,
                    "workers": 1,
                },
                "evaluation": {"tasks": [{"name": "nl_rx", "test": tests[0].source.path}]},
            }
        )
    )
    done = run(config)
    assert done.returncode == 0 and "dropped 4 records as contaminated" in done.stdout, done.stderr
    assert texts_of(tmp_path / "out") == [pair(row) for row in clean]
    assert "was prepared with a different data.decontaminate" in run_expecting_user_error(
        config, "data.decontaminate=false"
    )
    (tmp_path / "test.jsonl").write_text('{"text": ["a"]}\n')
    message = run_expecting_user_error(config)
    assert "during the preparation" not in message and f"content of {tmp_path / 'test.jsonl'}" in message
    assert run_expecting_user_error(config, f"data.path={tmp_path / 'new'}").startswith(
        f"{tmp_path / 'test.jsonl'}:1: 'text' holds"
    )
    (tmp_path / "test.jsonl").unlink()
    message = run_expecting_user_error(config)
    assert str(tmp_path / "test.jsonl") in message and "evaluation.tasks" in message


def test_task_files_use_the_column_mapping_of_the_corpus(tmp_path):
    config = data_config(tmp_path, json_source(tmp_path / "a.jsonl", views={"text": "question", "code": "sql"}))
    tasks = {
        "tasks": [
            {"name": "nl_rx"},
            {"name": "loss", "test": "b.jsonl"},
            {"name": "nl_rx", "test": "b.jsonl"},
            {"name": "nl_rx", "test": "b.jsonl", "label": "again"},
        ]
    }
    source = JsonSource(type="json", path="b.jsonl", views={"text": "question", "code": "sql"})
    assert evaluation_tests(config, tasks) == [
        TaskTest(task="loss", key="evaluation.tasks.1.test", source=source),
        TaskTest(task="nl_rx", key="evaluation.tasks.2.test", source=source),
    ]
    assert evaluation_tests(config, None) == evaluation_tests(config, {}) == []
    gsm8k = [{"name": "gsm8k", "test": {"type": kind, "path": "c.jsonl"}} for kind in ("json", "hub")]
    assert [test.source.type for test in evaluation_tests(config, {"tasks": gsm8k})] == ["json", "hub"]


@pytest.mark.parametrize(
    "evaluation, message",
    [
        ({"tasks": [{"name": "loss", "tests": "b.jsonl"}]}, "unknown key 'tests'; the nearest known key is 'test'"),
        ({"task": []}, "unknown key 'evaluation.task'"),
        ({"tasks": {"name": "loss"}}, "evaluation.tasks"),
        (["b.jsonl"], "evaluation"),
    ],
)
def test_a_misspelt_evaluation_section_is_an_error(tmp_path, evaluation, message):
    with pytest.raises(UserError, match=message):
        evaluation_tests(data_config(tmp_path, json_source(tmp_path / "a.jsonl")), evaluation)


def test_preparation_and_training_share_the_evaluation_keys():
    from pretrain.config import EvaluationConfig

    assert EvaluationFiles.model_fields.keys() == EvaluationConfig.model_fields.keys()


@pytest.mark.parametrize(
    "mappings",
    [
        [{"text": "{schema} {question}", "code": "sql"}, {"text": "sql", "code": "question"}, None],
        [{"text": "question", "code": "sql"}, {"text": "{schema} {question}", "code": "sql"}],
    ],
)
def test_a_test_file_is_read_with_the_mapping_of_every_source(mappings, pairs, write_jsonl, tmp_path, messages):
    test = [
        {
            "schema": f"CREATE TABLE t{number} (a INT)",
            "question": row["text"],
            "sql": "SELECT COUNT(*) FROM dogs WHERE town = 1",
        }
        for number, row in enumerate(pairs(20, seed=3))
    ]
    rows = [
        {"schema": "s", "question": row["text"], "sql": row["code"], "text": row["text"], "code": row["code"]}
        for row in pairs(60)
    ]
    common = rows[0] | {"question": "how many dogs are there in that town", "sql": test[0]["sql"]}
    sources = [
        json_source(write_jsonl(tmp_path / "a.jsonl", [*rows, test[5], common]), views=views)
        for views in mappings
        if views
    ]
    if None in mappings:
        sources.append(json_source(write_jsonl(tmp_path / "b.jsonl", rows)))
    config = data_config(tmp_path / "out", *sources, sequence_length=512, deduplicate="none")
    evaluation = {"tasks": [{"name": "nl_rx", "test": str(write_jsonl(tmp_path / "test.jsonl", test))}]}
    manifest = prepare(config, evaluation_tests(config, evaluation))
    # Each mapping with the question in its context finds the row with a test question. A mapping with the SQL as its
    # context finds no row, because test targets are not contexts.
    found = [location.partition(": ")[0] for location in manifest["dropped"]["contaminated"]["first"]]
    assert manifest["dropped"]["contaminated"]["count"] == (1 if None in mappings else 2)
    assert set(found) == {f"{tmp_path / 'a.jsonl'}:61"}
    assert any(
        line.startswith("kept out of training: ") and f"contexts of {tmp_path / 'test.jsonl'} (nl_rx)" in line
        for line in messages
    )


def test_a_preparation_without_test_rows_logs_a_note(pairs, write_jsonl, tmp_path, messages):
    source = json_source(write_jsonl(tmp_path / "a.jsonl", pairs(50)))
    note = "note: evaluation.tasks has no test rows: no contaminated record can be dropped"
    for decontaminate in (True, False):
        messages.clear()
        prepare(data_config(tmp_path / str(decontaminate), source, decontaminate=decontaminate))
        assert (note in messages) == decontaminate


def test_filtered_records_are_dropped_and_counted(write_jsonl, tmp_path):
    rows = [
        {"text": "long enough", "code": "also long"},
        {"text": "no", "code": "long enough"},
        {"text": "nul \0 inside", "code": "long enough"},
        {"text": "far too long " * 9, "code": "long enough"},
        {"text": "http://spam", "code": "long enough"},
    ]
    filters = {"min_characters": 3, "max_characters": 50, "forbidden": "https?://"}
    manifest = prepare(
        data_config(
            tmp_path / "out",
            json_source(write_jsonl(tmp_path / "a.jsonl", rows)),
            filters=filters,
            tokenizer={"vocab_size": 300},
        )
    )
    assert texts_of(tmp_path / "out") == [pair(rows[0])]
    assert {
        reason: [location.partition(": ")[0][-1] for location in drop["first"]]
        for reason, drop in manifest["dropped"].items()
    } == {"nul": ["3"], "too_short": ["2"], "too_many_characters": ["4"], "forbidden": ["5"]}
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert all(f"1 as `{reason}`" in summary for reason in manifest["dropped"])


def test_dropped_records_do_not_affect_the_tokenizer(leaky, write_jsonl, tmp_path):
    source, tests, clean = leaky
    prepare(data_config(tmp_path / "out", source, sequence_length=512), tests)
    prepare(
        data_config(tmp_path / "clean", json_source(write_jsonl(tmp_path / "clean.jsonl", clean)), sequence_length=512)
    )
    model = "tokenizer/tokenizer.json"
    assert (tmp_path / "out" / model).read_bytes() == (tmp_path / "clean" / model).read_bytes()


def test_a_test_file_without_a_context_is_an_error(write_jsonl, pairs, tmp_path):
    source = json_source(write_jsonl(tmp_path / "a.jsonl", pairs(9)))
    with pytest.raises(
        UserError, match=r"b\.jsonl:1: no text for the views text and code; the row has q: if a source of data\.sources"
    ):
        prepare(data_config(tmp_path / "out", source), task_tests(write_jsonl(tmp_path / "b.jsonl", [{"q": "a"}])))
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"b\.jsonl \(nl_rx\) \(evaluation\.tasks\.0\.test\) has no rows"):
        prepare(data_config(tmp_path / "out", source), task_tests(tmp_path / "b.jsonl"))


def test_deduplicate_near_drops_near_duplicates(write_jsonl, tmp_path):
    rng = random.Random(3)
    words = ["list", "all", "the", "names", "of", "dogs", "and", "cats", "in", "a", "town", "sorted", "by", "size"]
    long = [" ".join(rng.choices(words, k=120)) for _ in range(20)]
    rows = [{"text": text, "code": text[::-1]} for text in long]
    near = [{"text": text.replace(" ", "  ").upper(), "code": text[::-1]} for text in long[5:10]]
    sources = [
        json_source(write_jsonl(tmp_path / f"{name}.jsonl", file_rows))
        for name, file_rows in (("first", rows), ("near", [*near, rows[3]]))
    ]
    settings = {"sequence_length": 4096, "deduplicate": "near"}
    manifest = prepare(data_config(tmp_path / "out", *sources, **settings))
    assert texts_of(tmp_path / "out") == [pair(row) for row in rows]
    assert {reason: drop["count"] for reason, drop in manifest["dropped"].items()} == {
        "duplicate": 1,
        "near_duplicate": 5,
    }
    prepare(data_config(tmp_path / "strict", *sources, near_threshold=0.999, workers=2, **settings))
    assert len(texts_of(tmp_path / "strict")) >= len(rows)
    with pytest.raises(UserError, match="near_threshold has no effect without deduplicate: near"):
        data_config(tmp_path / "x", *sources, near_threshold=0.9)
