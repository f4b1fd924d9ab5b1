"""Filters: each reason, which comes first, and mistakes in the configuration."""

import pytest

from data_prep.config import FiltersConfig
from data_prep.config_file import validate
from data_prep.console import UserError
from data_prep.selection.filters import why_filtered


@pytest.mark.parametrize("views, settings, expected", [
    (("a question", "an answer"), {}, ""),
    (("a\0b", "c"), {}, "nul"),
    (("a", "\0"), {}, "nul"),
    (("abc", "abcd"), {"min_characters": 4}, "too_short"),
    (("abcd", "abc"), {"min_characters": 4}, "too_short"),
    (("abcd", "abcd"), {"min_characters": 4}, ""),
    (("", "abcd"), {"min_characters": 4}, ""),  # a view that is not there is not short
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
    (("long and bad", "good"), {"min_characters": 4, "max_characters": 5, "forbidden": "bad"}, "too_many_characters"),
])
def test_a_record_is_left_out_for_the_first_reason_that_holds(views, settings, expected):
    assert why_filtered(views, FiltersConfig(**settings)) == expected


@pytest.mark.parametrize("settings, expected", [
    ({"forbidden": "(a"}, "data.filters.forbidden: '(a' is no regular expression: missing )"),
    ({"forbidden": "a{99999999999}"}, "is no regular expression"),
    ({"min_characters": 5, "max_characters": 4}, "data.filters: max_characters (4) is below min_characters (5)"),
    ({"min_characters": -1}, "data.filters.min_characters"),
    ({"max_characters": 0}, "data.filters.max_characters"),
    ({"maximum": 3}, "unknown key 'data.filters.maximum'"),
])
def test_a_filter_that_cannot_act_is_one_line_before_anything_runs(settings, expected):
    with pytest.raises(UserError) as raised:
        validate(FiltersConfig, settings, "data.filters")
    assert expected in str(raised.value) and "\n" not in str(raised.value)
