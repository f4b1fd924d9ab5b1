"""Tests of hub data sets: local folders of each format, shards, and missing or unreachable data sets."""

import json
import os
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.pipeline import prepare
from data_prep.utils.console import UserError
from tests.commands import ROOT
from tests.data_prep.sources.source_helpers import open_reader, read_views, read_with_locations
from tests.small_corpora import data_config

ROWS = [{"text": f"t{row}", "code": None if row == 2 else f"c,\n{row}", "n": row} for row in range(5)]


def make_shards(folder, kind: str):
    """Write three shards of five rows each, and return their folder."""
    folder.mkdir()
    for shard in range(3):
        rows = [row | {"text": f"{shard}-{row['text']}"} for row in ROWS]
        if kind == "jsonl":
            (folder / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard}.parquet")
        else:
            (folder / f"{shard}.csv").write_text(
                "text,code,n\n" + "".join(f'{row["text"]},"{row["code"] or ""}",{row["n"]}\n' for row in rows)
            )
    return folder


def reader(path, names=("text", "code"), **more):
    return open_reader(names, type="hub", path=path, **more)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_local_files_are_read_by_the_reader_of_their_format(tmp_path, kind):
    source = reader(make_shards(tmp_path / "set", kind))
    assert len(source.pieces()) == 3 and all(piece.size > 0 for piece in source.pieces()) and source.note == ""
    expected = [(f"{shard}-t{row}", "" if row == 2 else f"c,\n{row}") for shard in range(3) for row in range(5)]
    assert read_views(source) == expected
    line = 4 if kind == "csv" else 2  # after the header and the line break in the previous row
    assert read_with_locations(source)[6] == (expected[6], f"{tmp_path / 'set' / '1'}.{kind}:{line}")


@pytest.mark.parametrize("code", ["2003-04-05", "2003-04-05T06:07:08Z", "12:30", "1e5", "007", "true", "NaN"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_text_is_not_converted(tmp_path, code, kind):
    (tmp_path / f"a.{kind}").write_text(
        f"text,code\nday,{code}\n" if kind == "csv" else json.dumps({"text": "day", "code": code}) + "\n"
    )
    assert read_views(reader(tmp_path)) == [("day", code)]


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 500 + "]" * 500])
def test_an_unused_column_cannot_fail_a_row(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(
        f'{{"text": "a", "code": "b", "n": {value}}}\n' + json.dumps({"text": "c", "code": "d"}) + "\n"
    )
    assert read_views(reader(tmp_path)) == [("a", "b"), ("c", "d")]


def test_files_outside_all_splits_are_reported(tmp_path, messages):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("pairs-train", "pairs-test", "pairs-extra", ".hidden"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name, "code": "x"}) + "\n")
    (folder / "LICENSE").write_text("not data")
    source = reader(folder)
    assert read_views(source) == [("pairs-train", "x")]
    assert source.note == (
        f"note: {folder} (data.sources.0.path) "
        "is read as on the hub, by file names or its README.md, and a file is "
        f"in no split: {folder / 'pairs-extra.jsonl'}; to read all files of one type, set that type, such as type: json"
    )
    prepare(data_config(tmp_path / "out", {"type": "hub", "path": str(folder)}, tokenizer={"vocab_size": 293}))
    assert source.note in messages


def test_a_readme_and_a_data_folder_are_read_as_on_the_hub(tmp_path, monkeypatch):
    for name in ("data/a-train.jsonl", "data/b-train.jsonl", "data/test.jsonl", "more/train.jsonl"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text(json.dumps({"text": name, "code": "x"}) + "\n")
    readme = (
        "---\nconfigs:\n- {config_name: one, data_dir: data, default: true}\n"
        "- {config_name: two, data_files: more/*.jsonl}\n---\n"
    )
    (tmp_path / "set" / "README.md").write_text(readme)
    monkeypatch.chdir(tmp_path)
    assert [text for text, _ in read_views(reader("set"))] == ["data/a-train.jsonl", "data/b-train.jsonl"]
    assert read_with_locations(reader("set", hub_split="test")) == [(("data/test.jsonl", "x"), "set/data/test.jsonl:1")]
    assert [text for text, _ in read_views(reader("./set/", config="two"))] == ["more/train.jsonl"]


def test_a_readme_may_set_the_separator_and_other_settings_of_the_library(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.csv").write_text("text;code\n'a';b\n")
    plain = {"config_name": "plain", "data_files": "a.csv", "sep": ";"}
    configs = [plain, plain | {"config_name": "quoted", "quotechar": "'"}]
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")
    assert read_views(reader(folder, config="plain")) == [("'a'", "b")]
    assert read_views(reader(folder, config="quoted")) == [("a", "b")]


def test_a_file_of_a_different_format_is_streamed(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    location = f"hub:{tmp_path}:train:shard 0"
    assert read_with_locations(reader(tmp_path, names=("text",))) == [
        (("one",), f"{location}:1"),
        (("two",), f"{location}:2"),
    ]


def test_folders_of_save_to_disk_are_read_by_split(tmp_path):
    datasets.disable_progress_bars()
    rows = {"text": ["2003-04-05", "b"], "code": ["c", "d"]}
    train, test = datasets.Dataset.from_dict(rows), datasets.Dataset.from_dict({"text": ["q"], "code": ["a"]})
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "one")
    assert (
        read_views(reader(tmp_path / "both"))
        == read_views(reader(tmp_path / "one"))
        == [("2003-04-05", "c"), ("b", "d")]
    )
    assert read_views(reader(tmp_path / "both", hub_split="test")) == [("q", "a")]
    for folder, more, expected in (
        ("both", {"hub_split": "validation"}, r"both .* has no split 'validation', only train, test: set data\."),
        ("one", {"hub_split": "test"}, r"without splits: remove data\.sources\.0\.hub_split"),
        ("one", {"config": "x"}, r"no configurations: remove data\.sources\.0\.config"),
    ):
        with pytest.raises(UserError, match=expected):
            reader(tmp_path / folder, **more)


def test_columns_are_mapped_to_views_as_in_json_lines(tmp_path):
    path = make_shards(tmp_path / "set", "parquet")
    assert read_views(reader(path, views={"code": "{text}/{code}"}))[:3] == [
        ("", "0-t0/c,\n0"),
        ("", "0-t1/c,\n1"),
        ("", ""),
    ]
    assert read_with_locations(reader(path, views={"code": "n"}))[0][0] == ("", "0")
    folder = tmp_path / "chat"
    folder.mkdir()
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (folder / "a.jsonl").write_text(json.dumps({"messages": turns, "many": ["x", "y", "z"]}) + "\n")
    assert read_views(reader(folder)) == [("q", "a")]
    assert read_views(reader(folder, views="many")) == [("x", "y"), ("z", "")]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_missing_column_is_reported_at_opening(tmp_path, kind):
    with pytest.raises(
        UserError,
        match=r"set/0.* has no column 'answer', only text, code, n: "
        r"set the columns of the views in data\.sources\.0\.views",
    ):
        reader(make_shards(tmp_path / "set", kind), views={"code": "answer"})


@pytest.mark.parametrize(
    "more, expected",
    [
        (
            {"hub_split": "test"},
            r"^.*set \(data\.sources\.0\.path\) has no split 'test', only train: set data\.sources\.0\.hub_split",
        ),
        ({"config": "other"}, r"cannot open the data set .*set \(data\.sources\.0\.path\), .*other.* not found"),
    ],
)
def test_a_missing_split_or_configuration_is_reported(tmp_path, more, expected):
    with pytest.raises(UserError, match=expected) as raised:
        reader(make_shards(tmp_path / "set", "jsonl"), **more)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_a_data_set_is_reported(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot open the data set .*empty"):
        reader(tmp_path / "empty")
    with pytest.raises(UserError, match=r"there is no folder .*absent \(data\.sources\.0\.path\)"):
        reader(tmp_path / "absent")


def test_a_corrupt_file_is_named_and_does_not_affect_the_other_files(tmp_path):
    folder = make_shards(tmp_path / "set", "jsonl")
    (folder / "2.jsonl").write_bytes(b'{"text": "a", "code": "b"}\n{"text": \n')
    *good, last = read_with_locations(reader(folder))
    assert len(good) == 11 and last == (
        ("malformed", "not JSON (Expecting value: line 1 column 9 (char 8))"),
        f"{folder / '2.jsonl'}:2",
    )
    folder = make_shards(tmp_path / "other", "parquet")
    (folder / "2.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"2\.parquet is corrupt or not a Parquet file"):
        reader(folder)


def test_an_unreachable_data_set_is_one_line(tmp_path, run_expecting_user_error):
    config = tmp_path / "run.yaml"
    config.write_text(
        json.dumps(
            {
                "name": "x",
                "data": {
                    "path": str(tmp_path / "out"),
                    "tokenizer": {"vocab_size": 300},
                    "sources": [{"type": "hub", "path": "nobody/nothing-at-all"}],
                },
            }
        )
    )
    message = run_expecting_user_error(
        config, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    )
    assert "cannot open the data set nobody/nothing-at-all (data.sources.0.path), split train: " in message


def test_datasets_is_imported_only_when_needed():
    code = "import sys, data_prep.pipeline; assert 'datasets' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
