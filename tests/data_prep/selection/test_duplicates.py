"""Exact duplicates equal the ones that a dictionary of the complete corpus finds."""

import hashlib
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.selection.duplicates import (
    ROWS_PER_PART,
    SPLIT_PRIORITY,
    dropped,
    equal_groups,
    fingerprints,
    num_parts,
    resolve,
    write_fingerprints,
)

Corpus = list[list[tuple[tuple[str, ...], int, int]]]
"""(views, ordinal, rank of the split) of the records of each unit."""
VIEWS = st.tuples(st.sampled_from(["", "a", "b", "ab", "ä", "\ud800"]), st.sampled_from(["", "b", "a", "c"]))
CORPORA = st.lists(
    st.lists(st.tuples(VIEWS, st.integers(1, 3), st.integers(0, 2)), max_size=12).map(
        lambda rows: [
            (views, ordinal, rank)
            for (views, _, rank), ordinal in zip(rows, itertools.accumulate(gap for _, gap, _ in rows), strict=True)
        ]
    ),
    max_size=5,
)


def find_by_dictionary(corpus: Corpus) -> list[list[int]]:
    """Return the ordinals to drop for each unit, from one pass over all records in order of preference."""
    seen = {}
    drops = [[] for _ in corpus]
    records = [(rank, unit, ordinal, views) for unit, rows in enumerate(corpus) for views, ordinal, rank in rows]
    for _, unit, ordinal, views in sorted(records, key=lambda record: record[:3]):
        if seen.setdefault(views, (unit, ordinal)) != (unit, ordinal):
            drops[unit].append(ordinal)
    return [sorted(drop) for drop in drops]


def find_on_disk(corpus: Corpus, folder: Path, parts: int, order: list[int] | None = None) -> list[list[int]]:
    paths = [folder / f"unit-{unit}.npy" for unit in range(len(corpus))]
    for path, rows in zip(paths, corpus, strict=True):
        write_fingerprints(
            path,
            fingerprints([views for views, _, _ in rows]),
            np.array([ordinal for _, ordinal, _ in rows], int),
            np.array([rank for _, _, rank in rows], int),
        )
    outs = [folder / f"part-{part}-of-{parts}.npy" for part in range(parts)]
    for part in order or range(parts):
        resolve(paths, part, parts, outs[part])
    return [dropped(outs, unit).tolist() for unit in range(len(corpus))]


@settings(deadline=None, max_examples=60)
@given(CORPORA, st.sampled_from([1, 2, 3, 7]))
def test_dropped_records_match_the_dictionary(corpus, parts):
    with tempfile.TemporaryDirectory() as folder:
        assert find_on_disk(corpus, Path(folder), parts) == find_by_dictionary(corpus)


def test_a_larger_corpus_with_the_parts_in_any_order(tmp_path):
    rng = np.random.default_rng(0)
    corpus = [
        [
            ((f"text {number % 700}", f"code {number % 11}"), ordinal, int(rank))
            for ordinal, (number, rank) in enumerate(zip(rng.integers(0, 5000, 2000), rng.choice(3, 2000), strict=True))
        ]
        for _ in range(5)
    ]
    expected = find_by_dictionary(corpus)
    assert sum(map(len, expected)) > 3000
    assert find_on_disk(corpus, tmp_path, 4, [2, 0, 3, 1]) == expected
    assert find_on_disk(corpus, tmp_path, 1) == expected


def test_the_record_to_keep_is_chosen_by_split_then_unit_then_position(tmp_path):
    train, validation, test = (SPLIT_PRIORITY.index(split) for split in ("train", "validation", "test"))
    one = ("q", "a")
    assert find_on_disk([[(one, 0, train)], [(one, 5, test)], [(one, 2, validation)]], tmp_path, 2) == [[0], [], [2]]
    assert find_on_disk([[(one, 3, train), (one, 9, train)], [(one, 0, train)]], tmp_path, 2) == [[9], [0]]


def test_fingerprints_distinguish_views_and_their_number():
    texts = [
        ("ab", ""),
        ("a", "b"),
        ("", "ab"),
        ("ab",),
        ("a", "b", ""),
        ("a;", "b"),
        ("a", ";b"),
        ("1,1;ab",),
        (),
        ("\0", "\0"),
        ("\0\0", ""),
    ]
    assert len(np.unique(fingerprints(texts), axis=0)) == len(texts)
    digest = hashlib.blake2b(b"1,1;ab", digest_size=16).digest()  # the digest is the same on any machine
    assert (
        fingerprints([("a", "b")] * 2).tolist()
        == [[int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")]] * 2
    )
    assert fingerprints([]).shape == (0, 2)


def test_fingerprints_equal_in_one_half_are_not_equal(tmp_path):
    rows = np.array([[7, 1], [7, 2], [8, 1], [7, 1], [2**64 - 1, 0], [2**64 - 1, 0], [0, 0], [0, 0]], np.uint64)
    write_fingerprints(tmp_path / "unit.npy", rows, np.arange(8), np.full(8, 2))
    for parts in (1, 2, 3):
        for part in range(parts):
            resolve([tmp_path / "unit.npy"], part, parts, tmp_path / f"out-{part}.npy")
        assert dropped([tmp_path / f"out-{part}.npy" for part in range(parts)], 0).tolist() == [3, 5, 7]
    assert equal_groups([tmp_path / "unit.npy"], 0, 1).sizes.tolist() == [2, 2, 2]


def test_empty_units_and_no_units(tmp_path):
    assert find_on_disk([[], [(("a",), 0, 2)], []], tmp_path, 2) == [[], [], []]
    resolve([], 0, 1, tmp_path / "out.npy")
    assert dropped([tmp_path / "out.npy"], 0).tolist() == [] == dropped([], 3).tolist()


@pytest.mark.parametrize("rows, parts", [(0, 1), (1, 1), (ROWS_PER_PART, 1), (ROWS_PER_PART + 1, 2), (10**9, 250)])
def test_the_number_of_parts_grows_with_the_corpus(rows, parts):
    assert num_parts(rows) == parts
