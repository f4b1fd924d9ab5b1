"""Tests of the mapping from columns to views: templates, lists of texts, partial mappings, and errors."""

import itertools
import json
import random

import pytest

from data_prep.sources.record import Record
from data_prep.utils.console import UserError
from tests.data_prep.sources.source_helpers import open_reader

ROW = {
    "name": "cat",
    "summary": "a small {animal}",
    "n": 3,
    "none": None,
    "empty": "",
    "messages": [{"role": "user", "content": "hi"}],
    "half": "\ud83d",
    "raw{": "odd",
    "tags": ["a", "b"],
}


def reader(tmp_path, row: dict, views, names=("text", "code")):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    return open_reader(names, type="json", path=path, views=views)


def read(tmp_path, row: dict, views, names=("text", "code")) -> list[Record]:
    source = reader(tmp_path, row, views, names)
    return list(source.read(source.pieces()[0]))


@pytest.mark.parametrize(
    "template, text",
    [
        ("{name}: {summary}", "cat: a small {animal}"),
        ("{{{name}}}", "{cat}"),
        ("{{name}} {name}", "{name} cat"),
        ("{name}{name}", "catcat"),
        ("{name}}}{{", "cat}{"),
        ("{messages.user}!", "hi!"),
        ("{name}{absent}", ""),
        ("{none}: {name}", ""),
        ("{empty}: {name}", ""),
        ("{messages.assistant}{name}", ""),
        ("name", "cat"),
        ("{name} {n}", "cat 3"),
        ("n", "3"),
        ("messages.user", "hi"),
        ("messages.assistant", ""),
        ("absent", ""),
        ("none", ""),
    ],
)
def test_a_template_inserts_its_columns_unchanged(tmp_path, template, text):
    assert read(tmp_path, ROW, {"code": template}) == [Record(("", text), 1)]


@pytest.mark.parametrize("template", ["{name", "name}", "{}", "{na{me}", "{{name}", "a}b{name}", "{{{name}}"])
def test_an_invalid_template_is_reported_with_its_key(tmp_path, template):
    with pytest.raises(
        UserError, match=r"data\.sources\.0\.views\.code: cannot parse the template .*double a literal brace"
    ):
        reader(tmp_path, ROW, {"code": template})


def test_a_template_without_a_column_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"data\.sources\.0\.views\.code: the template '\{\{x\}\}' names no column"):
        reader(tmp_path, ROW, {"code": "{{x}}"})


@pytest.mark.parametrize(
    "template, problem",
    [
        ("{half}", "'half' holds a lone surrogate, which is not valid text"),
        ("tags", "'tags' holds a value of type list, not text"),
        ("messages", "'messages' holds a value of type list, not text"),
    ],
)
def test_a_value_that_is_not_text_is_reported_with_its_column(tmp_path, template, problem):
    assert read(tmp_path, ROW, {"text": "name", "code": template}) == [Record(None, 1, problem)]


def test_a_mapping_may_omit_views_but_must_not_name_unknown_views(tmp_path):
    assert reader(tmp_path, ROW, {"code": "name"}).provided_views == (False, True)
    assert reader(tmp_path, ROW, None).provided_views == (True, True)
    with pytest.raises(
        UserError, match=r"data\.sources\.0\.views names \['answer', 'text'\], but data\.views are \['text', 'code'\]"
    ):
        reader(tmp_path, ROW, {"text": "a", "answer": "b"})


def test_a_list_of_texts_fills_the_views_in_order(tmp_path):
    rng = random.Random(4)
    for count, width in itertools.product(range(12), range(1, 6)):
        names = tuple(f"v{view}" for view in range(width))
        texts = [f"text {number}" for number in range(count)]
        texts_with_gaps = texts[:]
        for gap in (None, "", " \n"):
            texts_with_gaps.insert(rng.randint(0, len(texts_with_gaps)), gap)
        records = read(tmp_path, {"paraphrases": texts_with_gaps}, "paraphrases", names)
        assert all(len(record.views) == width and record.position == 1 for record in records)
        flat = [text for record in records for text in record.views]
        assert flat[:count] == texts and not any(flat[count:]) and len(records) == max(1, -(-count // width))
    assert reader(tmp_path, {}, "paraphrases", names).provided_views == (True,) * 5


@pytest.mark.parametrize(
    "value, problem",
    [
        ("one", "a value of type str, not a list of texts"),
        (3, "a value of type int, not a list of texts"),
        ({"a": 1}, "a value of type dict, not a list"),
        (["a", {}], "a value of type dict, not text"),
        (["a", ["b"]], "a value of type list, not text"),
        (["a", "\udc00"], "a lone surrogate"),
    ],
)
def test_a_value_that_is_not_a_list_of_texts_is_reported_with_its_column(tmp_path, value, problem):
    (record,) = read(tmp_path, {"p": value}, "p")
    assert record.views is None and record.reason == "malformed" and record.problem.startswith(f"'p' holds {problem}")


def test_a_missing_or_null_list_becomes_an_empty_record(tmp_path):
    assert (
        read(tmp_path, {}, "p")
        == read(tmp_path, {"p": None}, "p")
        == read(tmp_path, {"p": []}, "p")
        == [Record(("", ""), 1)]
    )


def test_the_grammar_fills_the_configured_views():
    pairs = open_reader(type="nlrx", records=3)
    assert open_reader(("one", "two", "three"), type="nlrx", records=3).provided_views == (True, False, True)
    template = open_reader(("x",), type="nlrx", records=3, views={"x": "{code} # {text}"})
    (piece,) = template.pieces()
    assert [record.views[0] for record in template.read(piece)] == [
        f"{code} # {text}" for (text, code), *_ in pairs.read(piece)
    ]
    with pytest.raises(UserError, match="the grammar has no column 'regex', only text, code"):
        open_reader(type="nlrx", records=3, views={"code": "regex"})
