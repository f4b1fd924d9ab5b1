"""Data sets of the hub: local folders of each format, shards, and what cannot be reached or does not exist."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.console import UserError
from tests.data_prep.sources.reading import located, opened, texts
from tests.launching import ROOT

ROWS = [{"text": f"t{row}", "code": None if row == 2 else f"c,\n{row}", "n": row} for row in range(5)]


def make(folder, kind: str):
    """Three shards of five rows."""
    folder.mkdir()
    for shard in range(3):
        rows = [row | {"text": f"{shard}-{row['text']}"} for row in ROWS]
        if kind == "jsonl":
            (folder / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard}.parquet")
        else:
            (folder / f"{shard}.csv").write_text("text,code,n\n" + "".join(f'{row["text"]},"{row["code"] or ""}",{row["n"]}\n' for row in rows))
    return folder


def reader(path, names=("text", "code"), **more):
    return opened(names, type="hub", path=path, **more)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_each_shard_of_a_local_folder_is_a_piece(tmp_path, kind):
    source = reader(make(tmp_path / "set", kind))
    assert len(source.pieces()) == 3 and all(piece.size > 0 for piece in source.pieces())
    expected = [(f"{shard}-t{row}", "" if row == 2 else f"c,\n{row}") for shard in range(3) for row in range(5)]
    assert texts(source) == expected
    assert located(source)[6] == (expected[6], f"hub:{tmp_path / 'set'}:train:shard 1:2")


def test_columns_become_views_as_those_of_json_lines(tmp_path):
    path = make(tmp_path / "set", "parquet")
    assert texts(reader(path, views={"code": "{text}/{code}"}))[:3] == [("", "0-t0/c,\n0"), ("", "0-t1/c,\n1"), ("", "")]
    assert located(reader(path, views={"code": "n"}))[0][0] == ("", "0")
    folder = tmp_path / "chat"
    folder.mkdir()
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (folder / "a.jsonl").write_text(json.dumps({"messages": said, "many": ["x", "y", "z"]}) + "\n")
    assert texts(reader(folder)) == [("q", "a")]
    assert texts(reader(folder, views="many")) == [("x", "y"), ("z", "")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_wrong_column_is_told_at_opening(tmp_path, kind):
    with pytest.raises(UserError, match=r"hub:.*set:train has no column 'answer', only text, code, n; name its columns in data\.sources\.0\.views"):
        reader(make(tmp_path / "set", kind), views={"code": "answer"})


@pytest.mark.parametrize("more, expected", [
    ({"hub_split": "test"}, "split test: .*Bad split: test"), ({"config": "other"}, "other.* not found"),
])
def test_a_split_or_configuration_that_there_is_not_says_so(tmp_path, more, expected):
    with pytest.raises(UserError, match=rf"cannot open the data set .*set \(data\.sources\.0\.path\), .*{expected}") as raised:
        reader(make(tmp_path / "set", "jsonl"), **more)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_no_data_set_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot open the data set .*empty"):
        reader(tmp_path / "empty")
    with pytest.raises(UserError, match=r"there is no folder .*absent \(data\.sources\.0\.path\)"):
        reader(tmp_path / "absent")


@pytest.mark.parametrize("kind, content", [
    ("jsonl", b'{"text": "a", "code": "b"}\n{"text": \n'), ("parquet", b"PAR1 no more"), ("csv", b"text,code\n\xff\xfe,b\n"),
])
def test_a_damaged_shard_is_named_and_costs_no_other(tmp_path, kind, content):
    folder = make(tmp_path / "set", kind)
    (folder / f"2.{kind}").write_bytes(content)
    source = reader(folder)
    first, _, last = source.pieces()
    assert len(list(source.read(first))) == 5
    with pytest.raises(UserError, match=r"cannot read shard 2 of hub:.*set:train: ") as raised:
        list(source.read(last))
    assert "\n" not in str(raised.value)


def test_a_data_set_that_cannot_be_reached_is_one_line(tmp_path, mistake):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"name": "x", "data": {"path": str(tmp_path / "out"), "tokenizer": {"vocab_size": 300},
                                                        "sources": [{"type": "hub", "path": "nobody/nothing-at-all"}]}}))
    told = mistake(config, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)})
    assert "cannot open the data set nobody/nothing-at-all (data.sources.0.path), split train: " in told


def test_the_library_is_imported_only_where_it_is_used():
    code = "import sys, data_prep.pipeline; assert 'datasets' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
