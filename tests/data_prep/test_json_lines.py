"""JSON lines: every line once whatever the cuts, what is a record, and why a line is none."""

import itertools
import json
from pathlib import Path

import pytest

from data_prep.config import JsonSource
from data_prep.console import UserError
from data_prep.sources.json_lines import UNIT_BYTES, JsonLines

VIEWS = ("text", "code")
AWKWARD = (b'\xef\xbb\xbf{"text": "a", "code": "b"}\r\n\n'
           b'{"text": "\xc3\xa9\xe2\x80\xa8", "code": "\xf0\x9f\x91\x8d"}\n \t \r\n[1]\n\n\n{"code": "c", "text": "no newline"}')


def reader(path: Path, views: dict[str, str] | None = None, names: tuple[str, ...] = VIEWS) -> JsonLines:
    return JsonLines(JsonSource(type="json", path=str(path), views=views), names, "data.sources.0")


def read_one(tmp_path: Path, line: bytes | dict, views: dict[str, str] | None = None, names=VIEWS):
    path = tmp_path / "one.jsonl"
    path.write_bytes(line if isinstance(line, bytes) else json.dumps(line).encode())
    (record,) = reader(path, views, names).read(0, path.stat().st_size)
    return record


def found(source: JsonLines, bounds: list[tuple[int, int]]) -> list[tuple]:
    return [(record.views, record.problem, source.where(start, record.position))
            for start, stop in bounds for record in source.read(start, stop)]


@pytest.mark.parametrize("content", [AWKWARD, AWKWARD + b"\n", b'{"text": "only", "code": "one"}', b"\n\n\n", b"\r\n{}\r\n"])
def test_every_cut_gives_each_line_once_with_its_number(tmp_path, content):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    expected = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            value = json.loads(line.decode().lstrip("\ufeff"))
            views = (value.get("text", ""), value.get("code", "")) if isinstance(value, dict) else None
            expected.append((views, "" if views else "a JSON list, not an object", f"{path}:{number}"))
    source, size = reader(path), len(content)
    for cut in range(size + 1):
        assert found(source, [(0, cut), (cut, size)]) == expected, cut
    assert found(source, [(byte, byte + 1) for byte in range(size)]) == expected


def test_units_cover_a_large_file_without_overlap(tmp_path):
    path, size = tmp_path / "large.jsonl", 3 * UNIT_BYTES + 5
    with path.open("wb") as file:
        file.truncate(size)  # sparse: only its size is asked for
    bounds = reader(path).units()
    assert len(bounds) == 4 and bounds[0][0] == 0 and bounds[-1][1] == size
    assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))


def test_an_empty_file_has_no_units(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.touch()
    assert reader(path).units() == []


@pytest.mark.parametrize("line, problem", [
    (b'{"text": "a", "code": "b"', "not JSON"), (b"text,code", "not JSON"), (b'{"text": "a\x00", "code": "b"}', "not JSON"),
    (b'{"text": "a", "code": "b"}\x00', "not JSON"), (b"[" * 200_000 + b"]" * 200_000, "not JSON"),
    (b'{"text": "a", "code": "b", "n": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"text": "a", "code": "b"} {}', "not JSON"),
    (b'{"text": "\xff", "code": "b"}', "not UTF-8 (invalid start byte at byte 10 of the line)"),
    ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
    (b"[]", "a JSON list, not an object"), (b'"text"', "a JSON str, not an object"), (b"null", "a JSON NoneType, not an object"),
    (b'{"text": 3, "code": "b"}', "'text' holds a JSON int, not text"),
    (b'{"text": "a", "code": ["b"]}', "'code' holds a JSON list, not text"),
    (b'{"text": "a", "code": false}', "'code' holds a JSON bool, not text"),
    (b'{"text": "\\ud83d", "code": "b"}', "half a surrogate pair"),
    (b'{"text": "a", "code": "\\udc4d\\ud83d"}', "half a surrogate pair"),
    (b'{"messages": "hello"}', "`messages` is no list of objects"), (b'{"messages": ["hello"]}', "`messages` is no list of objects"),
    (b'{"messages": [{"role": "user", "content": [{"text": "a"}]}]}', "'messages.user' holds a JSON list, not text"),
])
def test_a_line_that_is_no_record_says_why(tmp_path, line, problem):
    record = read_one(tmp_path, line)
    assert record.views is None and problem in record.problem and "\n" not in record.problem and len(record.problem) < 200


@pytest.mark.parametrize("line, views", [
    ({"text": "a", "code": "b", "other": [1, {}]}, ("a", "b")),
    ({"text": "a\0b\n\r", "code": "\u2028 \ufeff"}, ("a\0b\n\r", "\u2028 \ufeff")),
    ({"text": "a"}, ("a", "")), ({"text": "a", "code": None}, ("a", "")), ({}, ("", "")), ({"text": " ", "code": ""}, (" ", "")),
    (b'{"text": "\\ud83d\\udc4d", "code": "b"}', ("\U0001f44d", "b")),
    (b'\xef\xbb\xbf{"text": "a", "code": "b"}\r\n', ("a", "b")),
])
def test_named_columns_are_taken_as_they_are(tmp_path, line, views):
    assert read_one(tmp_path, line) == (views, 1, "")


def test_messages_give_the_user_and_assistant_message_and_leave_the_system_out(tmp_path):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert read_one(tmp_path, {"messages": messages}).views == ("q", "a")
    assert read_one(tmp_path, {"messages": messages[:2]}).views == ("q", "")


def test_a_second_turn_is_no_record_rather_than_lost(tmp_path):
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    record = read_one(tmp_path, {"messages": messages})
    assert record.views is None and "2 turns of the user" in record.problem
    assert read_one(tmp_path, {"messages": []}).views == ("", "")


def test_views_map_to_columns_and_to_roles(tmp_path):
    line = {"question": "q", "answer": "a", "text": "t", "messages": [{"role": "system", "content": "s"}]}
    assert read_one(tmp_path, line, {"text": "question", "code": "answer"}).views == ("q", "a")
    assert read_one(tmp_path, line, {"code": "text", "text": "messages.system"}).views == ("s", "t")
    assert read_one(tmp_path, line, {"in": "answer", "out": "question"}, ("in", "out")).views == ("a", "q")


def test_a_mapping_of_other_views_is_a_mistake(tmp_path):
    path = tmp_path / "x.jsonl"
    path.touch()
    with pytest.raises(UserError, match=r"data\.sources\.0\.views names \['answer', 'text'\], but data\.views are \['text', 'code'\]"):
        reader(path, {"text": "a", "answer": "b"})


def test_a_file_that_cannot_be_read_names_itself_and_its_key(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*absent\.jsonl \(data\.sources\.0\.path\): No such file"):
        reader(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="Is a directory"):
        reader(tmp_path)
    with pytest.raises(UserError, match=r"data\.sources\.0\.path is not set: .*data\.sources\.0\.path=FILE"):
        JsonLines(JsonSource(type="json"), VIEWS, "data.sources.0")
