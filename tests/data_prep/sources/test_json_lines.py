"""JSON lines: every line is read once wherever a file is cut, and each malformed line has a reason."""

import itertools
import json
import random
import resource
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from data_prep.sources import files
from data_prep.sources.record import Record
from data_prep.utils.console import UserError
from tests.data_prep.sources.source_helpers import (
    SHARED,
    VIEWS,
    compress_for_suffix,
    needs_shared,
    open_reader,
    read_views,
    read_with_locations,
    write,
)

AWKWARD = (
    b'\xef\xbb\xbf{"text": "a", "code": "b"}\r\n\n'
    b'{"text": "\xc3\xa9\xe2\x80\xa8", "code": "\xf0\x9f\x91\x8d"}\n \t \r\n'
    b'[1]\n\n\n{"code": "c", "text": "no newline"}'
)
GOOD = b'{"text": "a", "code": "b"}\n'


def reader(path: Path, views=None, names: tuple[str, ...] = VIEWS):
    return open_reader(names, type="json", path=path, views=views)


def read_one(tmp_path: Path, line: bytes | dict, views=None, names=VIEWS) -> Record:
    path = tmp_path / "one.jsonl"
    path.write_bytes(line if isinstance(line, bytes) else json.dumps(line).encode())
    source = reader(path, views, names)
    (piece,) = source.pieces()
    (record,) = source.read(piece)
    return record


def read_naively(path: Path, content: bytes) -> list[tuple]:
    """Return the records of a file and their locations; this reads the complete content at once."""
    expected = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            value = json.loads(line.decode().lstrip("\ufeff"))
            views = (
                (value.get("text", ""), value.get("code", ""))
                if isinstance(value, dict)
                else ("malformed", "a value of type list, not a JSON object")
            )
            expected.append((views, f"{path}:{number}"))
    return expected


@pytest.mark.parametrize(
    "content", [AWKWARD, AWKWARD + b"\n", b'{"text": "only", "code": "one"}', b"\n\n\n", b"\r\n{}\r\n", b"\n", b""]
)
def test_each_line_is_read_once_wherever_the_file_is_cut(tmp_path, content, set_piece_size):
    path = write(tmp_path / "lines.jsonl", content)
    for length, block in itertools.product(range(1, len(content) + 2), (1, 2, 7, 100, files.BLOCK_BYTES)):
        set_piece_size(length, block)
        assert read_with_locations(reader(path)) == read_naively(path, content), (length, block)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_files_are_read_like_plain_ones(tmp_path, suffix):
    path = write(tmp_path / f"lines.jsonl{suffix}", AWKWARD)
    assert read_with_locations(reader(path)) == read_naively(path, AWKWARD)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_all_members_of_a_compressed_file_are_read(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(
        b"".join(
            compress_for_suffix(json.dumps({"text": str(part), "code": "c"}).encode() + b"\n", suffix)
            for part in range(5)
        )
    )
    assert read_views(reader(path)) == [(str(part), "c") for part in range(5)]


@pytest.mark.parametrize(
    "total, length",
    [
        (0, 4 << 20),
        (1, 4 << 20),
        (1 << 30, 4 << 20),
        ((1 << 30) + 1, 4 << 20),
        ((1 << 30) + 256, 8 << 20),
        (2 << 30, 8 << 20),
        (10 << 30, 64 << 20),
        (1 << 40, 64 << 20),
    ],
)
def test_pieces_grow_with_the_corpus(total, length):
    assert files.piece_length(total) == length


def test_pieces_cover_large_files_without_overlap(tmp_path):
    sizes = {"a.jsonl": (12 << 20) + 5, "b.json": 0, "c.ndjson": 1 << 20, "d.jsonl": 17}
    for name, size in sizes.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)  # sparse: the test reads only its size
    pieces = reader(tmp_path).pieces()
    assert [Path(piece.path).name for piece in pieces] == ["a.jsonl"] * 4 + ["c.ndjson", "d.jsonl"]
    assert all(piece.size == piece.stop - piece.start > 0 for piece in pieces)
    for path, group in itertools.groupby(pieces, key=lambda piece: piece.path):
        bounds = [(piece.start, piece.stop) for piece in group]
        assert bounds[0][0] == 0 and bounds[-1][1] == sizes[Path(path).name]
        assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))


def test_files_of_folders_and_globs_are_sorted_by_name(tmp_path):
    for number, name in enumerate(["b.jsonl", "a/z.json", "a.ndjson", "c/d/e.jsonl.gz", "c/d.json.zst"]):
        write(tmp_path / "data" / name, json.dumps({"text": name, "code": str(number)}).encode())
    for name in ("notes.txt", ".hidden.jsonl", ".git/x.jsonl", "a.jsonl.bak"):
        write(tmp_path / "data" / name, b"no record")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "data")  # a symlink loop
    write(tmp_path / "elsewhere" / "y.jsonl", b'{"text": "linked", "code": "9"}')
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    names = sorted(["b.jsonl", "a/z.json", "a.ndjson", "c/d/e.jsonl.gz", "c/d.json.zst"])
    assert [text for text, _ in read_views(reader(tmp_path / "data"))] == [*names, "linked"]
    assert [text for text, _ in read_views(reader(tmp_path / "data" / "*.ndjson"))] == ["a.ndjson"]
    assert [text for text, _ in read_views(reader(tmp_path / "data" / "[ac]"))] == [
        "a/z.json",
        "c/d.json.zst",
        "c/d/e.jsonl.gz",
    ]
    assert len(read_views(reader(tmp_path / "d*" / "c" / "**"))) == 2
    skipped = [tmp_path / "data" / name for name in (".git/", ".hidden.jsonl", "a.jsonl.bak", "notes.txt")]
    assert reader(tmp_path / "data").note == (
        f"note: {tmp_path / 'data'} (data.sources.0.path): skipping 4 files by name: "
        f"{skipped[0]}/, {skipped[1]}, {skipped[2]}, ..."
    )
    assert reader(tmp_path / "data" / "*.ndjson").note == reader(tmp_path / "data" / "b.jsonl").note == ""
    assert reader(tmp_path / "data" / "[ac]").note == "", "no file of this folder is skipped"
    literal = write(tmp_path / "x[1].jsonl", GOOD)
    assert read_views(reader(literal)) == [("a", "b")]


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"text": "a", "code": "b"', "not JSON"),
        (b"text,code", "not JSON"),
        (b'{"text": "a\x00", "code": "b"}', "not JSON"),
        (b'{"text": "a", "code": "b"}\x00', "not JSON"),
        (b"[" * 200_000 + b"]" * 200_000, "not JSON"),
        (b'{"a":' * 100_000 + b"1", "not JSON"),
        (b"\x00", "not JSON"),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", "not JSON"),
        (b'{"text": "a", "code": "b"} {}', "not JSON (Extra data"),
        (b"{'text': 'a'}", "not JSON"),
        (b'{"text": "a\tb", "code": "c"}', "not JSON"),
        (b'{"text": "\xff", "code": "b"}', "not UTF-8 (invalid start byte at byte 10 of the line)"),
        (b"\x1f\x8b\x08\x00", "not UTF-8"),
        (b'{"text": "\xe2\x82', "not UTF-8 (unexpected end of data at byte 10 of the line)"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
        (b"[]", "a value of type list, not a JSON object"),
        (b'"text"', "a value of type str, not a JSON object"),
        (b"null", "a value of type NoneType, not a JSON object"),
        (b"NaN", "a value of type float, not a JSON object"),
        (b'{"text": NaN, "code": "b"}', "'text' holds nan, not a finite number"),
        (b'{"text": {"a": 3}, "code": "b"}', "'text' holds a value of type dict, not text"),
        (b'{"text": "a", "code": ["b"]}', "'code' holds a value of type list, not text"),
        (b'{"text": "\\ud83d", "code": "b"}', "'text' holds a lone surrogate"),
        (b'{"text": "a", "code": "\\udc4d\\ud83d"}', "'code' holds a lone surrogate"),
        (b'{"messages": "hello"}', "`messages` is not a list of objects"),
        (b'{"messages": ["hello"]}', "`messages` is not a list of objects"),
        (b'{"messages": 3}', "`messages` is not a list of objects"),
        (b'{"messages": {"role": "user"}}', "`messages` is not a list of objects"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "'messages.user' holds a part of type image_url, not text",
        ),
    ],
)
def test_a_malformed_line_is_reported_with_the_reason(tmp_path, line, problem):
    record = read_one(tmp_path, line)
    assert record.views is None and record.reason == "malformed" and record.position == 1
    assert problem in record.problem and "\n" not in record.problem and len(record.problem) < 200


@pytest.mark.parametrize(
    "line, views",
    [
        ({"text": "a", "code": "b", "other": [1, {}]}, ("a", "b")),
        (b'{"text": "a", "code": "b", "other": [NaN, -Infinity]}', ("a", "b")),
        ({"text": "a\0b\n\r", "code": "\u2028 \ufeff"}, ("a\0b\n\r", "\u2028 \ufeff")),
        ({"text": "a"}, ("a", "")),
        ({"text": "a", "code": None}, ("a", "")),
        ({}, ("", "")),
        ({"text": " ", "code": ""}, ("", "")),
        (b'{"text": "\\ud83d\\udc4d", "code": "b"}', ("\U0001f44d", "b")),
        (b' \t{"text": "a", "code": "b"} \t\r\n', ("a", "b")),
        (b'\xef\xbb\xbf{"text": "a", "code": "b"}\r\n', ("a", "b")),
        ({"messages": None, "code": "c"}, ("", "c")),
    ],
)
def test_columns_are_read_unchanged(tmp_path, line, views):
    assert read_one(tmp_path, line) == (views, 1, "", "malformed", "")


def test_messages_give_the_user_and_assistant_texts_without_the_system_prompt(tmp_path):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    assert read_one(tmp_path, {"messages": messages}).views == ("q", "a")
    assert read_one(tmp_path, {"messages": messages[:2]}).views == ("q", "")
    assert read_one(tmp_path, {"messages": messages, "m": "between"}, names=("x", "m", "y")).views == (
        "q",
        "between",
        "a",
    )


def test_messages_with_a_second_turn_are_malformed(tmp_path):
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    record = read_one(tmp_path, {"messages": messages})
    assert record.views is None and "2 turns of the user" in record.problem
    assert read_one(tmp_path, {"messages": []}).views == ("", "")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_an_endless_line_takes_bounded_memory_and_does_not_affect_other_lines(tmp_path, suffix):
    longest = GOOD[:-1].replace(b"a", b"a" * (files.MAX_LINE_BYTES - len(GOOD) + 2))
    assert len(longest) == files.MAX_LINE_BYTES
    path = write(
        tmp_path / f"long{suffix}",
        GOOD + longest + b"\n" + longest.replace(b"aa", b"aaa", 1) + b"\n" + GOOD + b"x" * (200 << 20),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = read_with_locations(reader(path))
    # The limit of 150 MiB is enough for lines of 16 MiB, but not for a line of 200 MiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 << 10
    assert [location for _, location in found] == [f"{path}:{line}" for line in range(1, 6)]
    long = ("malformed", "a line of more than 16 MiB")
    assert [views if views in (("a", "b"), long) else len(views[0]) for views, _ in found] == [
        ("a", "b"),
        files.MAX_LINE_BYTES - len(GOOD) + 2,
        long,
        ("a", "b"),
        long,
    ]


@cache
def make_lines(count: int) -> bytes:
    return b"".join(
        b'{"text": "line %d", "code": "%d"}\n' % (number, number * 7919 % 1000003) for number in range(1, count + 1)
    )


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:-9],
        lambda data: data[:12],
        lambda data: data[:3],
        lambda data: b"",
        lambda data: b'{"text": "plain", "code": "after all"}\n',
        lambda data: data + b"trailing garbage",
        lambda data: b"\0" * 100,
        lambda data: data + data[: len(data) // 2],
    ],
)
def test_a_corrupt_compressed_file_is_reported_and_loses_no_earlier_line(tmp_path, suffix, damage):
    rows = 40_000
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(damage(compress_for_suffix(make_lines(rows), suffix)))
    *good, (problem, location) = read_with_locations(reader(path))
    assert all(
        views == (f"line {(number - 1) % rows + 1}", str(((number - 1) % rows + 1) * 7919 % 1000003))
        and location_of_line == f"{path}:{number}"
        for number, (views, location_of_line) in enumerate(good, start=1)
    )
    assert problem[0] == "damaged" and "the compressed file is" in problem[1] and "replace it" in problem[1]
    assert location == f"{path}:{len(good) + 1}"


@pytest.mark.parametrize("position", [0.3, 0.6, 0.9999])
def test_a_flipped_byte_of_a_gz_file_is_detected(tmp_path, position):
    data = bytearray(compress_for_suffix(make_lines(50_000), ".gz"))
    data[int(position * len(data))] ^= 0x10
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(data)
    assert any(
        isinstance(problem, tuple) and problem[0] == "damaged" for problem, _ in read_with_locations(reader(path))
    )


def test_all_complete_lines_of_a_truncated_gz_file_are_read(tmp_path):
    rows = [{"text": f"{number}", "code": random.Random(number).randbytes(100).hex()} for number in range(20_000)]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    content = compress_for_suffix(b"".join(lines), ".gz")
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(content[: int(0.7 * len(content))])
    unpacked = len(zlib.decompressobj(wbits=31).decompress(path.read_bytes()))
    complete = int(np.searchsorted(np.cumsum([*map(len, lines)]), unpacked, side="right"))
    *good, (problem, _) = read_with_locations(reader(path))
    assert problem[0] == "damaged" and [views[0] for views, _ in good] == [row["text"] for row in rows[:complete]]


def test_zeros_after_a_gz_file_are_ignored(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(compress_for_suffix(GOOD * 3, ".gz") + bytes(512))
    assert read_views(reader(path)) == [("a", "b")] * 3


def test_null_messages_are_ignored(tmp_path):
    assert read_one(tmp_path, {"text": "a", "code": "b", "messages": None}).views == ("a", "b")


def test_an_unreadable_file_is_named_with_its_key(tmp_path):
    for path, expected in [
        (tmp_path / "absent.jsonl", r"cannot read .*absent\.jsonl \(data\.sources\.0\.path\): No such file"),
        (tmp_path, r"\(data\.sources\.0\.path\) holds no file that ends in \.json, "),
        (tmp_path / "*.jsonl", r"no file matches .*\*\.jsonl \(data\.sources\.0\.path\): check the pattern"),
        ("/dev/null", r"/dev/null \(data\.sources\.0\.path\) is not a file"),
        (tmp_path / ("x" * 300), "File name too long"),
    ]:
        with pytest.raises(UserError, match=expected):
            reader(path)
    with pytest.raises(UserError, match=r"data\.sources\.0\.path is not set: .*data\.sources\.0\.path=FILE"):
        open_reader(type="json")
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "absent")
    for path in (tmp_path, tmp_path / "broken.jsonl"):
        with pytest.raises(UserError, match=r"cannot read .*broken\.jsonl \(data\.sources\.0\.path\): No such file"):
            reader(path)


def test_a_file_name_that_is_not_utf8_is_reported(tmp_path):
    (tmp_path / "a\udcff.jsonl").write_bytes(GOOD)
    with pytest.raises(UserError, match=r"is not UTF-8: rename it") as raised:
        reader(tmp_path)
    str(raised.value).encode()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_that_is_deleted_or_truncated_after_opening_is_an_error(tmp_path, suffix):
    path = write(tmp_path / f"a.jsonl{suffix}", GOOD * 100)
    source = reader(path)
    (piece,) = source.pieces()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"a\.jsonl.* became shorter"):
        list(source.read(piece))
    path.unlink()
    for read in (lambda: list(source.read(piece)), source.pieces):
        with pytest.raises(UserError, match=r"cannot read .*a\.jsonl.*: .*No such file"):
            read()


@needs_shared
@pytest.mark.parametrize("name", ["nl-rx-synth/train.jsonl", "gsm8k/test.jsonl", "geography/train.jsonl"])
def test_real_files_cut_into_small_pieces_match_json_loads(name, set_piece_size):
    path = SHARED / name
    expected = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        row = json.loads(line)
        texts = {message["role"]: message["content"] for message in row.get("messages", ())}
        expected.append(
            ((texts["user"], texts["assistant"]) if texts else (row["text"], row["code"]), f"{path}:{number}")
        )
    set_piece_size(9973, 4096)
    assert read_with_locations(reader(path)) == expected


@pytest.mark.parametrize("frame_position", ["at the start", "after another frame"])
def test_a_zst_file_with_a_long_window_is_not_reported_as_damaged(tmp_path, frame_position):
    """Use a frame like the ones of `zstd --long=31`: no content size, a window of 2 GiB, and one raw block."""
    content = GOOD * 3
    frame = bytes.fromhex("28b52ffd00a8") + (len(content) << 3 | 1).to_bytes(3, "little") + content
    path = tmp_path / "it's long.jsonl.zst"
    path.write_bytes((compress_for_suffix(content, ".zst") if frame_position == "after another frame" else b"") + frame)
    with pytest.raises(
        UserError,
        match=r"it's long\.jsonl\.zst was compressed with a window .* is not corrupt\. Compress it again: zstd -d",
    ) as raised:
        read_with_locations(reader(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("start", ["", "\ufeff", "-"])
def test_a_huge_integer_does_not_fail_the_line(tmp_path, start):
    digits = "9" * 5000
    line = (
        f'{{"text": "a", "n": -{digits}, "code": "b"}}'
        if start == "-"
        else f'{start}{{"text": "a", "n": [{digits}], "code": "b"}}'
    )
    assert read_one(tmp_path, line.encode()).views == ("a", "b")
    record = read_one(tmp_path, line.encode(), views={"text": "text", "code": "n"})
    assert (
        record.views == ("a", f"-{digits}")
        if start == "-"
        else record.problem == "'n' holds a value of type list, not text"
    )
    assert read_one(tmp_path, f'{{"text": {digits}'.encode()).problem.startswith("not JSON (Expecting")
