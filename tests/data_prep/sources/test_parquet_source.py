"""Parquet: every row is read once, as pandas reads it; only the needed columns are read; errors name the file."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.utils.console import UserError
from tests.data_prep.sources.source_helpers import SHARED, needs_shared, open_reader, read_views, read_with_locations

ROWS = {
    "text": [f"größe {row}" if row % 7 else None for row in range(3000)],
    "code": [f"code {row}" for row in range(3000)],
    "number": list(range(3000)),
    "tags": [[f"t{row}", None, "x"][: row % 4] for row in range(3000)],
}


def reader(path, views=None, names=("text", "code")):
    return open_reader(names, type="parquet", path=path, views=views)


def write(path, rows=ROWS, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.table(rows), path, **options)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"row_group_size": 100},
        {"row_group_size": 1},
        {"compression": "zstd", "row_group_size": 777},
        {"use_dictionary": False, "compression": "none"},
    ],
)
@pytest.mark.parametrize("piece_size", [1, 5000, 1 << 20])
def test_every_row_is_read_once_with_its_number(tmp_path, options, piece_size, set_piece_size):
    rows = {column: values[:1000] for column, values in ROWS.items()}
    path = write(tmp_path / "a.parquet", rows, **options)
    frame = pd.read_parquet(path)
    set_piece_size(piece_size)
    source = reader(path)
    assert read_with_locations(source) == [
        ((text or "", code), f"{path}:{row}")
        for row, (text, code) in enumerate(zip(frame["text"].fillna(""), frame["code"], strict=True), start=1)
    ]
    groups = pq.ParquetFile(path).num_row_groups
    pieces = source.pieces()
    assert pieces[-1].stop == groups and all(piece.size >= piece_size for piece in pieces[:-1])
    assert len(pieces) == groups if piece_size == 1 else len(pieces) < 100


def test_files_of_folders_and_globs_are_sorted_by_name(tmp_path):
    for name in ("b", "a", "c/d"):
        write(tmp_path / f"{name}.parquet", {"text": [name], "code": ["x"]})
    write(tmp_path / "empty.parquet", pa.table({"text": pa.array([], pa.string()), "code": pa.array([], pa.string())}))
    assert [text for text, _ in read_views(reader(tmp_path))] == ["a", "b", "c/d"]
    assert [text for text, _ in read_views(reader(tmp_path / "[ab].parquet"))] == ["a", "b"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()]
)
def test_every_string_type_is_read_as_text(tmp_path, kind):
    path = write(
        tmp_path / "a.parquet",
        pa.table({"text": pa.array(["a", None, "größe", ""], kind), "code": pa.array(["x"] * 4)}),
    )
    assert read_views(reader(path)) == [("a", "x"), ("", "x"), ("größe", "x"), ("", "x")]


def test_messages_and_lists_are_read_from_nested_columns(tmp_path):
    turns = [[{"role": "user", "content": f"q{row}"}, {"role": "assistant", "content": f"a{row}"}] for row in range(5)]
    path = write(tmp_path / "a.parquet", {"messages": turns, "many": [["a", "b", "c"]] * 4 + [None]})
    assert read_views(reader(path)) == [(f"q{row}", f"a{row}") for row in range(5)]
    assert read_views(reader(path, "many")) == [("a", "b"), ("c", "")] * 4 + [("", "")]
    assert read_views(reader(path, {"code": "{messages.user}?"}))[2] == ("", "q2?")


def test_a_missing_column_is_reported_with_the_existing_ones(tmp_path):
    path = write(tmp_path / "a.parquet")
    for views, column in [
        ({"text": "texts"}, "texts"),
        ({"text": "{text} {missing}"}, "missing"),
        ("list", "list"),
        ({"text": "messages.user"}, "messages"),
    ]:
        with pytest.raises(
            UserError,
            match=rf"a\.parquet has no column '{column}', only text, code, number, tags: .*data\.sources\.0\.views",
        ):
            reader(path, views)
    with pytest.raises(UserError, match=r"has no column 'question', only text"):
        reader(path, names=("question", "code"))
    write(tmp_path / "b.parquet", {"text": ["other"]})  # one of several files lacks a column
    with pytest.raises(UserError, match=r"b\.parquet has no column 'code', only text"):
        reader(tmp_path)


def test_a_value_that_is_not_text_is_malformed_and_does_not_affect_other_rows(tmp_path):
    path = write(tmp_path / "a.parquet")
    assert read_with_locations(reader(path, {"code": "number"}))[41] == (("", "41"), f"{path}:42")
    assert read_with_locations(reader(path, {"code": "tags"}))[1] == (
        ("malformed", "'tags' holds a value of type list, not text"),
        f"{path}:2",
    )
    offsets = pa.py_buffer(np.array([0, 1, 3, 4], np.int32))
    bad = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xff\xfec")])
    path = write(tmp_path / "bad.parquet", pa.table({"text": bad, "code": pa.array(["x", "y", "z"])}))
    assert read_with_locations(reader(path)) == [
        (("a", "x"), f"{path}:1"),
        (("malformed", "'text' holds bytes that are not UTF-8 text"), f"{path}:2"),
        (("c", "z"), f"{path}:3"),
    ]


BYTES = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())]


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_without_an_annotation_are_text_if_they_are_utf_8(tmp_path, kind):
    text = pa.array(["größe".encode(), b"caf\xe9", None, b""], kind)
    path = write(tmp_path / "a.parquet", pa.table({"text": text, "code": pa.array([b"x"] * 4, pa.binary(1))}))
    assert read_with_locations(reader(path)) == [
        (("größe", "x"), f"{path}:1"),
        (("malformed", "'text' holds bytes that are not UTF-8 text"), f"{path}:2"),
        (("", "x"), f"{path}:3"),
        (("", "x"), f"{path}:4"),
    ]


def nested_table(contents: list[bytes], kind: pa.DataType) -> pa.Table:
    """Return messages and lists of these byte strings, two per row, without validation."""
    offsets = pa.py_buffer(np.cumsum([0, *map(len, contents)], dtype=np.int32))
    texts = pa.Array.from_buffers(kind, len(contents), [None, offsets, pa.py_buffer(b"".join(contents))])
    turns = pa.StructArray.from_arrays(
        [pa.array(["user", "assistant"] * (len(contents) // 2)), texts], ["role", "content"]
    )
    rows = pa.array(range(0, len(contents) + 1, 2), pa.int32())
    return pa.table({"messages": pa.ListArray.from_arrays(rows, turns), "many": pa.ListArray.from_arrays(rows, texts)})


@pytest.mark.parametrize("kind", [pa.string(), pa.binary()])
@pytest.mark.parametrize(
    "views, column", [(None, "messages"), ("many", "many"), ({"code": "{messages.user}"}, "messages")]
)
def test_a_bad_byte_in_a_nested_column_affects_only_its_record(tmp_path, kind, views, column):
    contents = [f"größe {number}".encode() for number in range(4000)]
    contents[2 * 1500 + 1] = b"caf\xe9"
    path = write(tmp_path / "a.parquet", nested_table(contents, kind))
    found = read_with_locations(reader(path, views))
    assert found[1500] == (("malformed", f"{column!r} holds bytes that are not UTF-8 text"), f"{path}:1501")
    assert found[1499][0][-1].startswith("größe 299") and len(found) == 2000
    assert sum(views[0] == "malformed" for views, _ in found) == 1


def test_a_time_that_python_cannot_represent_is_malformed_and_does_not_affect_other_rows(tmp_path):
    path = write(
        tmp_path / "a.parquet", pa.table({"text": pa.array([0, 2**62], pa.timestamp("ms")), "code": ["a", "b"]})
    )
    (first, _), (second, location) = read_with_locations(reader(path))
    assert first == ("malformed", "'text' holds a value of type datetime, not text")
    assert second[1].startswith("'text' holds a value of type timestamp[ms] that cannot be read")
    assert location == f"{path}:2"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"text,code\na,b\n",
        lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1",
        lambda data: data[:-40] + b"\xff" * 32 + data[-8:],
    ],
)
def test_a_corrupt_file_is_named(tmp_path, damage):
    path = write(tmp_path / "a.parquet")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.parquet is corrupt or not a Parquet file \(.*\): replace it") as raised:
        reader(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip"])
def test_a_file_with_a_corrupt_row_group_is_named(tmp_path, compression):
    path = write(tmp_path / "a.parquet", compression=compression)
    data = bytearray(path.read_bytes())
    data[2000:2600] = bytes(600)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet is corrupt or not a Parquet file"):
        read_views(reader(path, {"text": "text", "code": "code"}))


def test_rows_with_and_without_messages_are_mixed(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = pa.table({"messages": [turns, None], "text": [None, "t"], "code": ["not this", "c"]})
    assert read_views(reader(write(tmp_path / "a.parquet", rows))) == [("q", "a"), ("t", "c")]


def test_a_page_checksum_detects_a_flipped_bit(tmp_path):
    rows = pa.table({view: [f"{view} {number}" for number in range(500)] for view in ("text", "code")})
    path = write(tmp_path / "a.parquet", rows, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[data.index(b"text 77")] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet is corrupt or not a Parquet file"):
        read_views(reader(path))


def test_a_file_that_is_deleted_after_opening_is_an_error(tmp_path):
    path = write(tmp_path / "a.parquet")
    source = reader(path)
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet: .*No such file"):
        list(source.read(source.pieces()[0]))
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet \(data\.sources\.0\.path\): No such file"):
        reader(path)
    with pytest.raises(UserError, match=r"holds no file that ends in \.parquet"):
        reader(tmp_path)


def test_only_needed_columns_are_read_in_bounded_memory(tmp_path):
    rows = 60_000
    table = pa.table(
        {
            "text": [f"t{row}" for row in range(rows)],
            "code": ["c"] * rows,
            "wide": pa.array(["x" * 2000 + str(row) for row in range(rows)]),
        }
    )
    path = write(tmp_path / "a.parquet", table, compression="none", use_dictionary=["code"])
    del table
    before = pa.total_allocated_bytes()
    source = reader(path)
    peak = 0
    for piece in source.pieces():
        for record in source.read(piece):
            if record.position % 5000 == 0:
                peak = max(peak, pa.total_allocated_bytes() - before)
    assert record.position == rows and peak < 20 << 20 < path.stat().st_size


@needs_shared
def test_real_rows_match_their_json_lines(tmp_path, set_piece_size):
    rows = [json.loads(line) for line in (SHARED / "nl-rx-synth" / "test.jsonl").read_text().splitlines()]
    path = write(tmp_path / "a.parquet", pa.Table.from_pylist(rows), row_group_size=123)
    expected = read_views(open_reader(type="json", path=SHARED / "nl-rx-synth" / "test.jsonl"))
    set_piece_size(1)
    assert read_views(reader(path)) == expected
