"""The shard format: other tools and an independent reader can read shards, and the manifest describes them."""

import shutil

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.layout import positions_needed
from data_prep.shards import open_shard, read_rows, row_lengths, write_shard

MASK = 2**64 - 1
Records = list[tuple[list[int], ...]]


def arrays(records: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(tokens) for tokens in records], np.int64)
    return np.array([token for tokens in records for token in tokens], np.int64), lengths


def write(path, records: Records, continues: list[bool], vocab_size: int = 512) -> dict:
    views = {f"view{number}": arrays([record[number] for record in records]) for number in range(len(records[0]))}
    return write_shard(path, 7, views, np.array(continues, bool), vocab_size)


def splitmix(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def independent_reader(path) -> list[dict]:
    """Check the checksum of each row of a shard, and return the rows.

    This reader is implemented only from docs/data.md.
    """
    rows = pa.ipc.open_file(str(path)).read_all().to_pylist()
    for number, row in enumerate(rows):
        views = [row[name] for name in row if name not in ("continues", "checksum")]
        continuation_token = 0
        if row["continues"]:
            following = [
                tokens for name, tokens in rows[number + 1].items() if name not in ("continues", "checksum") and tokens
            ]
            continuation_token = 1 + following[0][0]
        total = splitmix(continuation_token)
        for view, tokens in enumerate(views):
            if tokens is not None:
                content = 0
                for index, token in enumerate(tokens):
                    content += splitmix(token ^ index * 2**32)
                total += splitmix(content & MASK ^ splitmix(len(tokens)) ^ splitmix(view))
        assert row["checksum"] == total & 0xFFFFFFFF, number
    return rows


def random_records(seed: int, count: int, vocabulary: int) -> tuple[Records, list[bool]]:
    """Return pairs, records that lack a view and documents in up to four pieces, and which records continue."""
    rng = np.random.default_rng(seed)
    records, continues = [], []
    while len(records) < count:
        one, other = (rng.integers(0, vocabulary, rng.integers(1, 9)).tolist() for _ in range(2))
        match rng.integers(4):
            case 0:
                records.append((one, other))
                continues.append(False)
            case 1:
                records.append(([], other))
                continues.append(False)
            case _:
                pieces = int(rng.integers(1, 5))
                records += [(rng.integers(0, vocabulary, 8).tolist(), []) for _ in range(pieces)]
                continues += [True] * (pieces - 1) + [False]
    return records, continues


@pytest.mark.parametrize("vocabulary", [512, 2**16, 2**16 + 1, 200_000])
def test_an_independent_reader_agrees_on_contents_and_checksums(tmp_path, vocabulary):
    records, continues = random_records(vocabulary, 200, vocabulary)
    records[0] = ([vocabulary - 1], [0])
    entry = write(tmp_path / "a.arrow", records, continues, vocabulary)
    rows = independent_reader(tmp_path / "a.arrow")
    assert [(row["view0"] or [], row["view1"] or []) for row in rows] == [tuple(record) for record in records]
    assert [row["continues"] for row in rows] == continues
    assert None in [row["view0"] for row in rows] and [] not in [row["view0"] for row in rows], (
        "a missing view must be null"
    )
    shard = open_shard(tmp_path, entry, ["view0", "view1"])
    assert shard.columns[0].values.dtype == (np.uint16 if vocabulary <= 2**16 else np.uint32)
    all_rows = np.arange(len(records))
    contents = read_rows([(shard, all_rows)])
    for view in range(2):
        assert contents.view(view).tolist() == [token for record in records for token in record[view]]
        assert row_lengths([(shard, all_rows)])[:, view].tolist() == [len(record[view]) for record in records]
    following = [
        next(view for view in records[number + 1] if view)[0] if continued else -1
        for number, continued in enumerate(continues)
    ]
    assert contents.continuation_tokens.tolist() == following


def test_the_manifest_entry_describes_the_shard(tmp_path):
    records, continues = random_records(3, 300, 512)
    entry = write(tmp_path / "a.arrow", records, continues)
    continued_rows = [
        number for number, continued in enumerate(continues) if continued or (number and continues[number - 1])
    ]
    complete = np.array(
        [[len(view) for view in record] for number, record in enumerate(records) if number not in continued_rows]
    )
    assert entry["file"] == "a.arrow" and entry["source"] == 7 and entry["records"] == len(records)
    assert entry["incomplete"] == sum(not all(record) for record in records) and entry["continued"] == sum(continues)
    assert entry["tokens"] == {f"view{view}": sum(len(record[view]) for record in records) for view in range(2)}
    assert entry["longest"] == {f"view{view}": max(len(record[view]) for record in records) for view in range(2)}
    assert entry["positions_needed"] == positions_needed(complete).max()
    assert entry["bytes"] == (tmp_path / "a.arrow").stat().st_size


def test_a_shard_with_only_document_pieces_needs_no_positions(tmp_path):
    assert write(tmp_path / "a.arrow", [([5, 6], []), ([7], [])], [True, False])["positions_needed"] == 0


def test_datasets_pandas_and_pyarrow_open_the_shards_as_documented(tmp_path):
    expected = []
    for seed, name in enumerate(("train-00000.arrow", "train-00001.arrow")):
        records, continues = random_records(seed, 50, 512)
        write(tmp_path / name, records, continues)
        expected += [
            (one or None, other or None, continued) for (one, other), continued in zip(records, continues, strict=True)
        ]
    files = sorted(map(str, tmp_path.glob("train-*.arrow")))

    loaded = datasets.load_dataset("arrow", data_files=files, cache_dir=str(tmp_path / "cache"), split="train")
    assert list(zip(loaded["view0"], loaded["view1"], loaded["continues"], strict=True)) == expected
    frame = pandas.concat([pandas.read_feather(file) for file in files])
    assert [
        tuple(None if view is None else list(view) for view in row)
        for row in zip(frame.view0, frame.view1, strict=True)
    ] == [row[:2] for row in expected]
    assert frame["continues"].tolist() == [row[2] for row in expected] and frame["checksum"].dtype == np.uint32
    tables = [pa.ipc.open_file(pa.memory_map(file)).read_all() for file in files]
    found = [row for table in tables for row in table.to_pylist()]
    assert [(row["view0"], row["view1"], row["continues"]) for row in found] == expected
    assert all(table.column("view0").num_chunks == 1 for table in tables), "a shard must be a single record batch"


def test_a_shard_is_mapped_without_copying(tmp_path):
    records, continues = random_records(0, 500, 512)
    entry = write(tmp_path / "a.arrow", records, continues)
    before = pa.total_allocated_bytes()
    shard = open_shard(tmp_path, entry, ["view0", "view1"])
    assert pa.total_allocated_bytes() == before
    contents = read_rows([(shard, np.array([3, 1]))])
    assert contents.tokens.nbytes == 2 * sum(len(view) for number in (3, 1) for view in records[number]), (
        "only the requested rows must be read"
    )


def test_equal_records_make_equal_bytes(tmp_path):
    records, continues = random_records(1, 100, 512)
    first, second = (write(tmp_path / name, records, continues) for name in ("a.arrow", "b.arrow"))
    assert first | {"file": ""} == second | {"file": ""}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(*[st.lists(st.integers(0, 511), max_size=4)] * 3).filter(any), min_size=1, max_size=30),
    st.data(),
)
def test_any_rows_in_any_order_are_read_as_they_were_written(tmp_path_factory, records, data):
    folder = tmp_path_factory.mktemp("shards")
    entries = [write(folder / f"{name}.arrow", records, [False] * len(records)) for name in "ab"]
    parts = [
        (
            open_shard(folder, entry, ["view0", "view1", "view2"]),
            np.array(data.draw(st.lists(st.integers(0, len(records) - 1), min_size=1, max_size=9))),
        )
        for entry in entries
    ]
    contents = read_rows(parts)
    requested = [records[row] for _, rows in parts for row in rows]
    for view in range(3):
        assert contents.view(view).tolist() == [token for record in requested for token in record[view]]
    equal = [[one[view] == other[view] for other in requested] for one in requested for view in range(3)]
    assert equal == [
        [bool(contents.hashes[one, view] == contents.hashes[other, view]) for other in range(len(requested))]
        for one in range(len(requested))
        for view in range(3)
    ]
    shutil.rmtree(folder)
