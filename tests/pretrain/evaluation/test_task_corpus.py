"""Tests of a task's rows: the corpus that keeps them all, their formats, and targets that training has seen."""

import json
import shutil

import pytest

from data_prep.config import HubSource, JsonSource
from data_prep.task_rows import read_rows
from data_prep.tasks.row_format import RowFormat
from data_prep.utils.console import UserError
from pretrain.config import load_config
from pretrain.data.corpus import Corpus
from pretrain.evaluation import task_run
from pretrain.evaluation.task_corpus import prepare_task_corpus
from pretrain.run_folder import MODEL_DIR
from tests.commands import tiny_config, write_config


def test_equal_rows_of_a_task_are_all_kept(prepared, tmp_path):
    shutil.copytree(prepared / "tokenizer", tmp_path / MODEL_DIR)
    rows = [{"text": f"lines with {number % 3}", "code": f".*{number % 3}.*"} for number in range(10)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = JsonSource(type="json", path=str(tmp_path / "test.jsonl"))
    config = load_config(write_config(tmp_path, tiny_config(tmp_path)))
    assert len(Corpus(prepare_task_corpus(config, source, tmp_path / "evaluation").path, "train")) == 10
    assert [row.views for row in read_rows(source, ("text", "code"), "test")] == [tuple(row.values()) for row in rows]
    assert len(read_rows(source, ("text", "code"), "test", rows=4)) == 4


def test_a_task_corpus_needs_a_file(tmp_path):
    config = load_config(write_config(tmp_path, tiny_config(tmp_path)))
    with pytest.raises(UserError, match="a json source of the task has no path"):
        prepare_task_corpus(config, JsonSource(type="json"), tmp_path / "evaluation")


def test_rows_are_read_from_columns_messages_custom_formats_and_local_data_sets(tmp_path):
    views = ("text", "code")
    (tmp_path / "data").mkdir()
    lines = [
        {"text": "a", "code": "b"},
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
        {"question": "e", "answers": ["f", "g"]},
    ]
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")

    row_format = RowFormat(
        frozenset({"question", "answers"}), lambda row: (row["question"], row["answers"][0]), "question"
    )
    source = JsonSource(type="json", path=str(tmp_path / "data"))
    test_rows = read_rows(source, views, "task.test", row_format=row_format)
    assert [row.views for row in test_rows] == [("a", "b"), ("c", "d"), ("e", "f")]
    assert test_rows[2].columns["answers"] == ["f", "g"]
    with pytest.raises(
        UserError, match=r"test.jsonl:3: no text for the views text and code; the row has question, answers"
    ):
        read_rows(source, views, "task.test")
    (tmp_path / "data" / "test.jsonl").write_text('{"question": "e", "answers": []}\n')
    with pytest.raises(
        UserError, match=r"test.jsonl:1: list index out of range; the row was read in the format of the public data set"
    ):
        read_rows(source, views, "task.test", row_format=row_format)
    (tmp_path / "data" / "test.jsonl").write_text('{"q": "e", "a": "f"}\n')
    hub = HubSource(type="hub", path=str(tmp_path / "data"), hub_split="test", views={"text": "q", "code": "a"})
    assert [row.views for row in read_rows(hub, views, "task.test")] == [("e", "f")]
    with pytest.raises(UserError, match=r"has no split 'validation', only test: set task\.test\.hub_split"):
        read_rows(hub.model_copy(update={"hub_split": "validation"}), views, "task.test")


def test_targets_that_occur_in_the_training_corpus_are_counted(corpus, monkeypatch):
    monkeypatch.setattr("pretrain.data.corpus.READ_AT_A_TIME", 37)
    trained = [corpus.tokenizer.decode(corpus.tokens_by_view(number)["code"]) for number in (0, 99, len(corpus) - 1)]
    targets = [trained[0], "[0-9]never", *trained[1:], ""]
    counts = task_run.count_in_corpus(corpus, targets)
    assert [count > 0 for count in counts] == [True, False, True, True, False]
    views = [
        view.tolist() for number in range(len(corpus)) for view in corpus.tokens_by_view(number).values() if len(view)
    ]
    assert counts == [views.count(ids) for ids in corpus.tokenizer.encode_batch(targets)]
