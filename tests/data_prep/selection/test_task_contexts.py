"""The test rows of every task are kept out of training for every format of the training rows."""

import json

import pytest

from data_prep.config import DataConfig, HubSource, evaluation_tests
from data_prep.pipeline import prepare
from data_prep.task_rows import read_rows
from data_prep.tasks import public_row_format
from tests.small_corpora import data_config, json_source, task_tests

NUMBER = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def question(number: int) -> str:
    """Return a question that is too short to be recognised from a part of its text."""
    return f"why is {NUMBER[number]} odd?"


def chat(context: str, target: str) -> dict:
    return {
        "messages": [
            {"role": "system", "content": "Answer."},
            {"role": "user", "content": context},
            {"role": "assistant", "content": target},
        ]
    }


FORMS = {
    "nl_rx": lambda number: chat(question(number), "yes"),
    "gsm8k": lambda number: {"question": question(number), "answer": "So\n#### 1"},
    "spider": lambda number: {"db_id": "numbers", "question": question(number), "query": "SELECT 1"},
    "rotten_tomatoes": lambda number: {"text": question(number), "label": number % 2},
    "yelp": lambda number: {"text": question(number), "label": number % 5},
    "nq_open": lambda number: {"question": question(number), "answer": ["yes", "no"]},
    "hellaswag": lambda number: {"ctx": question(number), "endings": ["a", "b", "c", "d"], "label": str(number % 4)},
}
"""A row of each public data set, in the format of the hub or of the public LLM-JEPA data."""


@pytest.mark.parametrize("task", FORMS)
def test_every_test_row_of_a_public_format_is_kept_out(task, write_jsonl, tmp_path):
    tests = [FORMS[task](number) for number in range(len(NUMBER))]
    as_scored = read_rows(
        task_tests(write_jsonl(tmp_path / "test.jsonl", tests), task)[0].source,
        ("text", "code"),
        "x",
        row_format=public_row_format(task),
    )
    clean = [{"text": f"what comes after {number}?", "code": str(number + 1)} for number in range(40)]
    sources = {
        "as scored": [{"text": row.context, "code": "another answer"} for row in as_scored],
        "in messages": [chat(row.context, "another answer") for row in as_scored],
        "the question alone": [
            {"text": question(number).upper(), "code": "another answer"} for number in range(len(NUMBER))
        ],
        "clean": clean,
    }
    config = data_config(
        tmp_path / "out",
        *(json_source(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in sources.items()),
        deduplicate="none",
        sequence_length=512,
        tokenizer={"vocab_size": 300},
    )
    manifest = prepare(config, task_tests(tmp_path / "test.jsonl", task))
    assert [source["kept"] for source in manifest["sources"]] == [0, 0, 0, len(clean)]
    assert manifest["dropped"]["contaminated"]["count"] == 3 * len(NUMBER)


PROMPTS = {
    "messages": None,
    "the question": {"text": "question", "code": "query"},
    "a template": {"text": "Database {db_id}. {question}", "code": "query"},
}


@pytest.mark.parametrize("test_prompt", PROMPTS)
@pytest.mark.parametrize("training_prompt", PROMPTS)
def test_spider_questions_are_kept_out_for_every_pair_of_prompts(training_prompt, test_prompt, write_jsonl, tmp_path):
    public = [{"db_id": "numbers", "question": question(number), "query": "SELECT 1"} for number in range(len(NUMBER))]
    in_messages = [chat(f"For db_id:[numbers]\n\n{row['question']}", row["query"]) for row in public]
    clean = [
        {"db_id": "numbers", "question": f"what comes after {number}?", "query": f"SELECT {number}"}
        for number in range(40)
    ]
    train = (
        [*clean, *public]
        if training_prompt != "messages"
        else [*(chat(row["question"], row["query"]) for row in clean), *in_messages]
    )
    source = json_source(write_jsonl(tmp_path / "train.jsonl", train), views=PROMPTS[training_prompt])
    config = data_config(
        tmp_path / "out", source, deduplicate="none", sequence_length=512, tokenizer={"vocab_size": 306}
    )
    path = write_jsonl(tmp_path / "test.jsonl", in_messages if test_prompt == "messages" else public)
    manifest = prepare(config, task_tests(path, "spider", views=PROMPTS[test_prompt]))
    assert manifest["dropped"]["contaminated"]["count"] == len(public) and manifest["sources"][0]["kept"] == len(clean)


MAPPINGS = {
    "columns": {"text": "ask", "code": "sql"},
    "a template": {"text": "{schema}: {ask}", "code": "sql"},
    "messages": {"text": "messages.user", "code": "messages.assistant"},
}


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_mapped_test_rows_of_folders_globs_and_local_data_sets_are_kept_out(mapping, write_jsonl, tmp_path, messages):
    (tmp_path / "tests").mkdir()
    rows = [
        {"schema": f"t{number}", "ask": question(number), "sql": "SELECT 1"} | chat(question(number), "SELECT 1")
        for number in range(len(NUMBER))
    ]
    for half in range(2):
        write_jsonl(tmp_path / "tests" / f"{half}.jsonl", rows[half::2])
    train = [{"text": question(number), "code": "yes"} for number in range(len(NUMBER))]
    train += [
        {"text": f"t{number}: {question(number)}", "code": "yes"}
        for number in range(len(NUMBER) if mapping == "a template" else 0)
    ]
    clean = [{"text": f"what comes after {number}?", "code": str(number + 1)} for number in range(40)]
    source = json_source(write_jsonl(tmp_path / "train.jsonl", clean + train))
    views = MAPPINGS[mapping]
    sources = {
        "folder": {"type": "json", "path": str(tmp_path / "tests")},
        "glob": {"type": "json", "path": str(tmp_path / "t*" / "*.jsonl")},
        "hub": {"type": "hub", "path": str(tmp_path / "tests")},
    }
    for name, source_settings in sources.items():
        config = data_config(
            tmp_path / name, source, deduplicate="none", sequence_length=512, tokenizer={"vocab_size": 300}
        )
        messages.clear()
        tests = evaluation_tests(
            config, {"tasks": [{"name": "spider", "databases": "d", "test": source_settings | {"views": views}}]}
        )
        manifest = prepare(config, tests)
        assert manifest["dropped"]["contaminated"]["count"] == len(train), name
        assert manifest["settings"]["tests"][0]["source"]["views"] == views
        assert any(
            line.startswith("kept out of training: ")
            and "(spider); " in line
            and "are compared only with whole contexts" in line
            for line in messages
        )


def test_a_new_test_file_or_a_different_mapping_is_detected(write_jsonl, tmp_path, run_expecting_user_error):
    tests = tmp_path / "tests"
    tests.mkdir()
    write_jsonl(tests / "a.jsonl", [{"text": "first question", "code": "1", "other": "x"}])
    source = json_source(
        write_jsonl(tmp_path / "train.jsonl", [{"text": f"text {number}", "code": "x"} for number in range(50)])
    )
    config = {
        "name": "x",
        "data": {"path": str(tmp_path / "out"), "sources": [source], "tokenizer": {"vocab_size": 295}, "workers": 1},
        "evaluation": {"tasks": [{"name": "nl_rx", "test": {"type": "json", "path": str(tests)}}]},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config))
    prepared = DataConfig(**config["data"])
    prepare(prepared, evaluation_tests(prepared, config["evaluation"]))
    other = json.dumps({"type": "json", "path": str(tests), "views": {"text": "other", "code": "code"}})
    assert "was prepared with a different evaluation.tasks" in run_expecting_user_error(
        path, f"evaluation.tasks.0.test={other}"
    )
    write_jsonl(tests / "b.jsonl", [{"text": "second question", "code": "2"}])
    assert f"was prepared with a different content of {tests / 'b.jsonl'}" in run_expecting_user_error(path)


def test_only_the_incomplete_end_of_a_list_is_skipped(write_jsonl, tmp_path, messages):
    rows = [{"paraphrases": ["a", "b", "c"]}, {"paraphrases": ["d"]}, {"paraphrases": ["e", "f"]}]
    source = task_tests(write_jsonl(tmp_path / "test.jsonl", rows), views="paraphrases")[0].source
    assert [row.views for row in read_rows(source, ("one", "two"), "task.test")] == [("a", "b"), ("e", "f")]
    (message,) = messages
    assert "(task.test): 2 lists end with too few texts for a complete row; those texts are skipped" in message


def test_skipped_test_files_are_reported(write_jsonl, tmp_path, messages):
    (tmp_path / "tests").mkdir()
    write_jsonl(tmp_path / "tests" / "a.jsonl", [{"text": "first question", "code": "1"}])
    (tmp_path / "tests" / "b.csv").write_text("text,code\nsecond question,2\n")
    source = json_source(
        write_jsonl(tmp_path / "train.jsonl", [{"text": f"text {number}", "code": "x"} for number in range(50)])
    )
    prepare(data_config(tmp_path / "out", source, tokenizer={"vocab_size": 296}), task_tests(tmp_path / "tests"))
    assert any(line.startswith("note: ") and str(tmp_path / "tests" / "b.csv") in line for line in messages)


def test_a_changed_test_file_of_a_local_data_set_is_detected(write_jsonl, tmp_path, run_expecting_user_error):
    tests = tmp_path / "tests"
    tests.mkdir()
    write_jsonl(tests / "test.jsonl", [{"text": "first question", "code": "1"}])
    source = json_source(
        write_jsonl(tmp_path / "train.jsonl", [{"text": f"text {number}", "code": "x"} for number in range(50)])
    )
    config = {
        "name": "x",
        "data": {"path": str(tmp_path / "out"), "sources": [source], "tokenizer": {"vocab_size": 296}, "workers": 1},
        "evaluation": {"tasks": [{"name": "nl_rx", "test": {"type": "hub", "path": str(tests), "hub_split": "test"}}]},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    prepared = DataConfig(**config["data"])
    prepare(prepared, evaluation_tests(prepared, config["evaluation"]))
    write_jsonl(tests / "test.jsonl", [{"text": "another question", "code": "1"}])
    assert f"was prepared with a different content of {tests / 'test.jsonl'}" in run_expecting_user_error(
        tmp_path / "run.yaml"
    )


def test_a_name_column_of_a_template_is_not_a_context(write_jsonl, tmp_path):
    test = [{"db": "flights", "ask": "how many are there today", "sql": "SELECT 1"}]
    train = [{"text": "flights", "code": "a"}, {"text": "How many are there today?", "code": "b"}]
    train += [{"text": f"t {number}", "code": "x"} for number in range(40)]
    config = data_config(
        tmp_path / "out",
        json_source(write_jsonl(tmp_path / "a.jsonl", train)),
        tokenizer={"vocab_size": 296},
        deduplicate="none",
    )
    tests = task_tests(
        write_jsonl(tmp_path / "test.jsonl", test), "text", views={"text": "{ask} [{db}]", "code": "sql"}
    )
    assert prepare(config, tests)["dropped"]["contaminated"]["count"] == 1


def test_rows_of_a_test_file_fall_back_to_view_names_or_the_public_format(write_jsonl, tmp_path):
    rows = [
        {"text": "a", "code": "b"},
        {"question": "c", "answer": "#### 1"},
        {"ask": "d", "reply": "e"},
        chat("f", "g"),
    ]
    source = task_tests(write_jsonl(tmp_path / "test.jsonl", rows), views={"text": "ask", "code": "reply"})[0].source
    found = read_rows(source, ("text", "code"), "task.test", row_format=public_row_format("gsm8k"))
    assert [row.views for row in found] == [("a", "b"), ("c", "#### 1"), ("d", "e"), ("f", "g")]


def test_csv_values_of_a_local_data_set_are_unchanged(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.csv").write_text("text,code\na,007\nb,1.10\nc,2003-04-05\n")
    source = HubSource(type="hub", path=str(tmp_path / "set"), hub_split="test")
    assert [row.target for row in read_rows(source, ("text", "code"), "task.test")] == ["007", "1.10", "2003-04-05"]
