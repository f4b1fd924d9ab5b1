"""Tests of filters: each reason, the precedence of the reasons, and errors in the configuration."""

import signal
import threading

import pytest

from data_prep.config import FiltersConfig
from data_prep.pipeline import prepare
from data_prep.selection import filters
from data_prep.selection.filters import filter_reason, search_time_limit
from data_prep.utils.config_file import validate
from data_prep.utils.console import UserError
from tests.small_corpora import data_config, json_source


@pytest.mark.parametrize(
    "views, settings, expected",
    [
        (("a question", "an answer"), {}, ""),
        (("a\0b", "c"), {}, "nul"),
        (("a", "\0"), {}, "nul"),
        (("abc", "abcd"), {"min_characters": 4}, "too_short"),
        (("abcd", "abc"), {"min_characters": 4}, "too_short"),
        (("abcd", "abcd"), {"min_characters": 4}, ""),
        (("", "abcd"), {"min_characters": 4}, ""),  # a missing view is not too short
        (("äöüß",), {"min_characters": 4, "max_characters": 4}, ""),  # characters, not bytes
        (("abcde", "a"), {"max_characters": 4}, "too_many_characters"),
        (("a", "abcde"), {"max_characters": 4}, "too_many_characters"),
        (("fine", "see http://x.org"), {"forbidden": r"https?://"}, "forbidden"),
        (("see http://x.org", ""), {"forbidden": r"https?://"}, "forbidden"),
        (("HTTP", "x"), {"forbidden": "http"}, ""),
        (("HTTP", "x"), {"forbidden": "(?i)http"}, "forbidden"),
        (("first\nlast", "x"), {"forbidden": "(?m)^last$"}, "forbidden"),
        (("", "x"), {"forbidden": "^$"}, ""),
        (("bad\0", ""), {"min_characters": 9, "forbidden": "bad"}, "nul"),
        (("bad", "bad and long"), {"min_characters": 4, "max_characters": 5, "forbidden": "bad"}, "too_short"),
        (
            ("long and bad", "good"),
            {"min_characters": 4, "max_characters": 5, "forbidden": "bad"},
            "too_many_characters",
        ),
    ],
)
def test_the_first_matching_reason_is_returned(views, settings, expected):
    assert filter_reason(views, FiltersConfig(**settings)) == expected


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"forbidden": "(a"}, "data.filters.forbidden: '(a' is not a valid regular expression: missing )"),
        ({"forbidden": "a{99999999999}"}, "is not a valid regular expression"),
        ({"min_characters": 5, "max_characters": 4}, "data.filters: max_characters (4) is below min_characters (5)"),
        ({"min_characters": -1}, "data.filters.min_characters"),
        ({"max_characters": 0}, "data.filters.max_characters"),
        ({"maximum": 3}, "unknown key 'data.filters.maximum'"),
    ],
)
def test_an_invalid_filter_is_one_line(settings, expected):
    with pytest.raises(UserError) as raised:
        validate(FiltersConfig, settings, "data.filters")
    assert expected in str(raised.value) and "\n" not in str(raised.value)


BACKTRACKING = r"^(\d+[ ,.]?)+$"
"""An expression that needs 2**60 attempts on sixty digits and a letter."""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("malformed", ["fail", "drop"])
def test_a_runaway_expression_is_reported_with_the_record(tmp_path, write_jsonl, monkeypatch, workers, malformed):
    monkeypatch.setattr(filters, "LIMIT_SECONDS", 0.2)
    rows = [
        {"text": f"question {number}", "code": "1" * 60 + "x" if number == 41 else "12 13"} for number in range(100)
    ]
    source = json_source(write_jsonl(tmp_path / "a.jsonl", rows))
    config = data_config(
        tmp_path / "out", source, filters={"forbidden": BACKTRACKING}, workers=workers, on_malformed=malformed
    )
    with pytest.raises(
        UserError, match=r"a\.jsonl:42: data\.filters\.forbidden: the search did not end within 0\.2 s .*Rewrite it"
    ) as raised:
        prepare(config)
    assert "\n" not in str(raised.value)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0), "the timer must be off after the error"


def test_the_time_limit_applies_to_each_record_separately(monkeypatch):
    monkeypatch.setattr(filters, "LIMIT_SECONDS", 0.05)
    config = FiltersConfig(forbidden=r"(a+)+b")  # takes a few milliseconds per record
    with search_time_limit(config):
        assert [filter_reason(("a" * 12, ""), config) for _ in range(200)] == [""] * 200


def test_a_possessive_expression_terminates(tmp_path, write_jsonl):
    rows = [
        {"text": f"question {number}", "code": "1" * 60 + "x" if number == 41 else f"{number} x"}
        for number in range(100)
    ]
    config = data_config(
        tmp_path / "out",
        json_source(write_jsonl(tmp_path / "a.jsonl", rows)),
        filters={"forbidden": r"^(?:\d++[ ,.]?)++$"},
        tokenizer={"vocab_size": 300},
        sequence_length=256,
    )
    assert prepare(config)["splits"]["train"]["records"] == 100


def test_there_is_no_time_limit_outside_the_main_thread():
    config, found = FiltersConfig(forbidden="https?://"), []

    def search() -> None:
        with search_time_limit(config):
            found.append(filter_reason(("see http://x.org", ""), config))

    thread = threading.Thread(target=search)
    thread.start()
    thread.join()
    assert found == ["forbidden"]
