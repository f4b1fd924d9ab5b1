"""Arrow files and save_to_disk folders: every row of the listed files is read once, and errors name the file."""

import json
import shutil

import datasets
import pyarrow as pa
import pyarrow.ipc
import pytest

from data_prep.utils.console import UserError
from tests.data_prep.sources.source_helpers import open_reader, read_views, read_with_locations

ROWS = {
    "text": [f"größe {row}" if row % 7 else None for row in range(2500)],
    "code": [f"2003-04-{row:02}" for row in range(2500)],
    "number": list(range(2500)),
}
EXPECTED = [(text or "", code) for text, code in zip(ROWS["text"], ROWS["code"], strict=True)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A DatasetDict of two splits on disk. The train split has three files, and a cache file next to them."""
    folder = tmp_path_factory.mktemp("saved")
    datasets.disable_progress_bars()
    train, test = datasets.Dataset.from_dict(ROWS), datasets.Dataset.from_dict({"text": ["q"], "code": ["a"]})
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(folder, num_shards={"train": 3, "test": 1})
    shutil.copy(folder / "test" / "data-00000-of-00001.arrow", folder / "train" / "cache-1.arrow")
    return folder


def reader(path, views=None, kind="arrow", **more):
    return open_reader(type=kind, path=path, views=views, **more)


def test_listed_files_of_a_saved_data_set_are_its_pieces(saved):
    source = reader(saved / "train")
    assert len(source.pieces()) == 3 and read_views(source) == EXPECTED
    locations = [location for _, location in read_with_locations(source)]
    assert locations[0] == f"{saved / 'train' / 'data-00000-of-00003.arrow'}:1"
    assert locations[-1].endswith("data-00002-of-00003.arrow:833")
    assert read_with_locations(reader(saved / "train", {"code": "number"}))[3][0] == ("", "3")


def test_a_folder_of_splits_is_refused_and_the_splits_are_named(saved):
    with pytest.raises(
        UserError,
        match=r"saved0 \(data\.sources\.0\.path\) "
        r"has the splits train, test: set the path to one of their folders, such as .*train, or",
    ):
        reader(saved)


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_stream_and_file_formats_are_read(tmp_path, new):
    table = pa.table(ROWS)
    with new(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=400)
    source = reader(tmp_path / "a.arrow")
    assert read_with_locations(source) == [
        (views, f"{tmp_path / 'a.arrow'}:{row}") for row, views in enumerate(EXPECTED, start=1)
    ]


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"text,code\na,b\n", lambda data: data[:20]])
def test_a_corrupt_file_is_named(tmp_path, new, damage):
    table = pa.table(ROWS)
    with new(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "a.arrow").write_bytes(damage((tmp_path / "a.arrow").read_bytes()))
    with pytest.raises(UserError, match=r"a\.arrow is corrupt or not an Arrow file \(.*\): replace it") as raised:
        read_views(reader(tmp_path / "a.arrow"))
    assert "\n" not in str(raised.value)


def test_a_truncated_stream_is_named(tmp_path):
    table = pa.table(ROWS)
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=400)
    (tmp_path / "a.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:-5000])
    source = reader(tmp_path / "a.arrow")
    with pytest.raises(UserError, match=r"a\.arrow is corrupt or not an Arrow file"):
        read_views(source)


def test_missing_files_of_a_saved_data_set_are_named(saved, tmp_path):
    folder = shutil.copytree(saved / "train", tmp_path / "train")
    (folder / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00003\.arrow is missing, but .*state\.json lists it"):
        reader(folder)
    (folder / "state.json").write_text(json.dumps({"_data_files": []}))
    with pytest.raises(UserError, match=r"state\.json lists no _data_files"):
        reader(folder)
