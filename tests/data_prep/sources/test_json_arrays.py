"""A .json file with one array: every element is read once for any block size, and damage loses no earlier element."""

import json

import pytest

from data_prep.sources import files
from tests.data_prep.sources.source_helpers import (
    VIEWS,
    compress_for_suffix,
    open_reader,
    read_views,
    read_with_locations,
    write,
)

ROWS = [
    {"text": f"größe {number}\n犬", "code": ["x", {"n": number}] if number == 7 else f"c{number} ]}}, ["}
    for number in range(40)
]
EXPECTED = [(row["text"], row["code"]) for row in ROWS]


def reader(path, names=VIEWS):
    return open_reader(names, type="json", path=path)


@pytest.mark.parametrize(
    "layout",
    [{}, {"indent": 2}, {"separators": (",", ":"), "ensure_ascii": False}, {"indent": 0, "ensure_ascii": False}],
)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("block_bytes", [1, 3, 100, files.BLOCK_BYTES])
def test_every_element_is_a_record_with_its_number(tmp_path, monkeypatch, layout, suffix, block_bytes):
    monkeypatch.setattr(files, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(files, "SMALL_BLOCK", block_bytes)
    path = write(tmp_path / f"a.json{suffix}", b"\xef\xbb\xbf \r\n" + json.dumps(ROWS, **layout).encode() + b"\n\n")
    expected = [(views, f"{path}, element {number}") for number, views in enumerate(EXPECTED, start=1)]
    expected[7] = (("malformed", "'code' holds a value of type list, not text"), f"{path}, element 8")
    source = reader(path)
    assert len(source.pieces()) == 1 and read_with_locations(source) == expected


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"[]", []),
        (b" [ ] \n", []),
        (b'[{"text": "a", "code": "b"}]', [("a", "b")]),
        (b'[1, {"text": "a", "code": "b"}]', [("malformed", "a value of type int, not a JSON object"), ("a", "b")]),
        (b'[{"text": "a", "code": "b", "n": ' + b"9" * 5000 + b"}]", [("a", "b")]),
        (b'[{"text": "\xff"}, {"text": "a", "code": "\xc3\xa4"}]', [("malformed", "not UTF-8"), ("a", "ä")]),
        (b'[{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]', [("q", "a")]),
    ],
)
def test_contents_of_an_array(tmp_path, content, expected):
    assert [views for views, _ in read_with_locations(reader(write(tmp_path / "a.json", content)))] == expected


@pytest.mark.parametrize(
    "rest, problem",
    [
        (b"", "no comma and no closing bracket after an element, line 2"),
        (b",", "no value after a comma, line 2"),
        (b", ]", "no value after a comma"),
        (b' {"text": "c"}]', "no comma and no closing bracket"),
        (b"] []", "text after the closing bracket"),
        (b", {'text': 1}]", "Expecting property name"),
        (b',\n{"text": "c', "Unterminated string starting at, line 3"),
        (b", " + b"[" * 100_000, "not JSON (maximum recursion depth exceeded"),
    ],
)
def test_corruption_loses_no_earlier_element(tmp_path, rest, problem):
    path = write(tmp_path / "a.json", b'[{"text": "a", "code": "b"},\n{"text": "a", "code": "b"}' + rest)
    *good, ((reason, message), location) = read_with_locations(reader(path))
    assert [views for views, _ in good] == [("a", "b")] * 2
    assert reason == "damaged" and problem in message
    assert message.endswith("the rest of the array is lost: fix the file")
    assert location == f"{path}, element 3"


def test_a_truncated_compressed_array_is_reported(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(compress_for_suffix(json.dumps(ROWS[8:]).encode(), ".gz")[:-20])
    *_, ((reason, message), _) = read_with_locations(reader(path))
    assert reason == "damaged" and "the compressed file is truncated" in message


def test_an_element_of_any_size_up_to_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 5000)
    monkeypatch.setattr(files, "BLOCK_BYTES", 100)
    rows = [{"text": "a", "code": "b" * 4000}, {"text": "a", "code": "b" * 20_000}]
    (views, _), ((reason, message), _) = read_with_locations(
        reader(write(tmp_path / "a.json", json.dumps(rows).encode()))
    )
    assert views == ("a", "b" * 4000) and reason == "damaged" and "an element of more than 16 MiB" in message


def test_json_lines_in_a_json_file_are_read_as_lines(tmp_path):
    assert read_views(
        reader(write(tmp_path / "a.json", b'{"text": "a", "code": "b"}\n{"text": "c", "code": "d"}'))
    ) == [("a", "b"), ("c", "d")]
    (problem, location), _ = read_with_locations(
        reader(write(tmp_path / "b.jsonl", b'[1]\n{"text": "c", "code": "d"}'))
    )
    assert problem == ("malformed", "a value of type list, not a JSON object") and location.endswith("b.jsonl:1")
