"""Tests of every row form that docs/data.md lists: in JSON lines, in Parquet, and as a test row."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.config import JsonSource
from data_prep.sources import open_source
from data_prep.task_rows import read_rows
from data_prep.utils.console import UserError
from tests.small_corpora import data_config

USER, ASSISTANT = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}
CALL = {"role": "assistant", "content": None}
PAIR = ("ask", "reply")
FORMS = {
    "columns": ({"text": "ask", "code": "reply"}, PAIR),
    "a number": ({"text": "ask", "code": 5}, ("ask", "5")),
    "a large number": ({"text": "ask", "code": 12345678901234567890}, ("ask", "12345678901234567890")),
    "a fraction": ({"text": "ask", "code": 0.5}, ("ask", "0.5")),
    "a truth value": ({"text": "ask", "code": True}, ("ask", "true")),
    "null": ({"text": "ask", "code": None}, ("ask", "")),
    "a blank view": ({"text": " \n", "code": "reply"}, ("", "reply")),
    "a list": ({"text": "ask", "code": ["reply"]}, "'code' holds a value of type list, not text"),
    "an object": ({"text": "ask", "code": {"a": 1}}, "'code' holds a value of type dict, not text"),
    "messages": ({"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT]}, PAIR),
    "messages with tool calls": (
        {"messages": [USER, CALL, {"role": "tool", "content": "found"}, CALL | {"content": " "}, ASSISTANT]},
        PAIR,
    ),
    "messages of parts": (
        {
            "messages": [
                USER | {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "sk"}]},
                ASSISTANT | {"content": [{"type": "text", "text": "reply"}]},
            ]
        },
        PAIR,
    ),
    "messages of texts": ({"messages": [USER | {"content": ["ask"]}, ASSISTANT | {"content": ["rep", "ly"]}]}, PAIR),
    "an image": (
        {"messages": [USER | {"content": [{"type": "image"}]}, ASSISTANT | {"content": [{"type": "text"}]}]},
        "'messages.user' holds a part of type image, not text",
    ),
    "several turns": (
        {"messages": [USER, ASSISTANT, USER, ASSISTANT]},
        "`messages` has 2 turns of the user, but a view holds one",
    ),
    "no answer": ({"messages": [USER, CALL]}, ("ask", "")),
    "a conversation": ({"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "reply"}]}, PAIR),
    "a conversation of ChatGPT": (
        {"conversations": [{"from": "human", "value": "ask"}, {"from": "chatgpt", "value": "reply"}]},
        PAIR,
    ),
    "a conversation of roles": ({"conversations": [USER, ASSISTANT]}, PAIR),
    "messages as ShareGPT": (
        {"messages": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "reply"}]},
        PAIR,
    ),
    "a conversation that is a name": ({"conversations": "thread-3", "text": "ask", "code": "reply"}, PAIR),
    "an empty conversation": ({"conversations": [], "text": "ask", "code": "reply"}, PAIR),
    "empty messages beside a conversation": ({"messages": [], "conversations": [USER, ASSISTANT]}, PAIR),
    "no messages": ({"messages": None, "text": "ask", "code": "reply"}, PAIR),
}
"""Form -> a row, and the views that are read from it or the problem that is reported."""
ONLY_JSON = {"a large number", "empty messages beside a conversation"}
"""Forms that Parquet cannot store or reads differently."""


def source_of(path, kind: str, **settings):
    return data_config(path.parent / "out", {"type": kind, "path": str(path)} | settings).sources[0]


def outcome(source) -> tuple | str:
    """Return the views of the only record of a source, or the problem that is reported for it."""
    reader = open_source(source, ("text", "code"), "data.sources.0")
    (record,) = (record for piece in reader.pieces() for record in reader.read(piece))
    return record.problem if record.views is None else record.views


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_json_lines(form, write_jsonl, tmp_path):
    row, expected = FORMS[form]
    assert outcome(source_of(write_jsonl(tmp_path / "a.jsonl", [row]), "json")) == expected


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ONLY_JSON])
def test_a_row_of_parquet(form, tmp_path):
    row, expected = FORMS[form]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert outcome(source_of(tmp_path / "a.parquet", "parquet")) == expected


@pytest.mark.parametrize("form", FORMS)
def test_a_test_row(form, write_jsonl, tmp_path):
    row, expected = FORMS[form]
    source = JsonSource(type="json", path=str(write_jsonl(tmp_path / "a.jsonl", [row])))
    # a test row must have all views, so an empty one is an error
    if isinstance(expected, tuple) and all(expected):
        assert [found.views for found in read_rows(source, ("text", "code"), "task.test")] == [expected]
        return
    with pytest.raises(UserError) as raised:
        read_rows(source, ("text", "code"), "task.test")
    assert str(raised.value).startswith(f"{tmp_path / 'a.jsonl'}:1: {expected if isinstance(expected, str) else ''}")


TEMPLATES = {
    "a number in a template": (
        {"id": 7, "ask": "why", "stars": 4},
        {"text": "{id}: {ask}", "code": "{stars} of 5"},
        ("7: why", "4 of 5"),
    ),
    "a role": ({"messages": [USER, ASSISTANT]}, {"text": "messages.user", "code": "messages.assistant"}, PAIR),
    "a role of ShareGPT": (
        {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "reply"}]},
        {"text": "conversations.user", "code": "conversations.gpt"},
        PAIR,
    ),
    "a role in a template": (
        {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT]},
        {"text": "{messages.system}\n{messages.user}", "code": "messages.assistant"},
        ("s\nask", "reply"),
    ),
}


@pytest.mark.parametrize("form", TEMPLATES)
def test_a_mapped_row(form, write_jsonl, tmp_path):
    row, views, expected = TEMPLATES[form]
    assert outcome(source_of(write_jsonl(tmp_path / "a.jsonl", [row]), "json", views=views)) == expected
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert outcome(source_of(tmp_path / "a.parquet", "parquet", views=views)) == expected


def test_nan_is_malformed(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "ask", "code": float("nan")}) + "\n")
    assert outcome(source_of(tmp_path / "a.jsonl", "json")) == "'code' holds nan, not a finite number"
