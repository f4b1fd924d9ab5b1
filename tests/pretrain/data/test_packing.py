"""Packing is best-fit decreasing, loses no record, exceeds no row, and fills rows on the corpora of the project."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.layout import Pairing, make_layout
from data_prep.nlrx_grammar import generate
from pretrain.data.packing import pack

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "nl-rx-synth"
ROW = 512


def row_fills(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.bincount(rows, weights=lengths).astype(int)


def naive_best_fit_decreasing(lengths: np.ndarray, row_length: int) -> list[int]:
    """Return the fill of each row: the longest record goes first, into the fullest row that has room for it."""
    rows: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [row for row, fill in enumerate(rows) if fill + length <= row_length]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += length
        else:
            rows.append(length)
    return rows


CASES = {
    "none": [],
    "one": [1],
    "one full row": [64],
    "all full": [64] * 5,
    "all ones": [1] * 130,
    "pairs that fit exactly": [40, 24] * 9,
    "nothing fits together": [33] * 7,
    **{f"uniform {seed}": np.random.default_rng(seed).integers(1, 65, 300) for seed in range(3)},
    "short": np.random.default_rng(3).integers(1, 9, 300),
    "skewed": np.minimum(np.random.default_rng(4).geometric(0.06, 300), 64),
}


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
def test_packing_is_best_fit_decreasing_and_keeps_every_record_within_a_row(lengths):
    lengths = np.array(lengths, np.int64)
    rows = pack(lengths, 64)
    assert rows.shape == lengths.shape
    filled = row_fills(rows, lengths)
    assert (filled <= 64).all() and (filled > 0).all(), "rows are numbered without gaps"
    assert filled.sum() == lengths.sum()
    assert sorted(filled.tolist()) == sorted(naive_best_fit_decreasing(lengths, 64))


def pack_one_by_one(lengths: list[int], row_length: int) -> list[int]:
    """Return the row of each record, packed one record at a time.

    Candidates are the rows with the least sufficient room. The record goes to the candidate that reached it last.
    """
    order = sorted(range(len(lengths)), key=lambda record: -lengths[record])
    room: dict[int, list[int]] = {}  # free positions -> rows, in the order in which they reached this room
    row_of, opened = {}, 0
    for record in order:
        fitting = [free for free, rows in room.items() if rows and free >= lengths[record]]
        free, row = (min(fitting), room[min(fitting)].pop()) if fitting else (row_length, opened)
        opened += not fitting
        row_of[record] = row
        if free > lengths[record]:
            room.setdefault(free - lengths[record], []).append(row)
    return [row_of[record] for record in range(len(lengths))]


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40).flatmap(lambda row: st.tuples(st.just(row), st.lists(st.integers(0, row), max_size=80))))
def test_packing_equals_packing_one_record_at_a_time(case):
    row_length, lengths = case
    assert pack(np.array(lengths, np.int64), row_length).tolist() == pack_one_by_one(lengths, row_length)


def test_rows_are_numbered_in_opening_order_and_packing_is_deterministic():
    assert pack(np.array([3, 5, 8, 5, 2, 3]), 8).tolist() == [2, 1, 0, 2, 3, 1]
    lengths = np.random.default_rng(0).integers(1, 64, 500)
    np.testing.assert_array_equal(pack(lengths, 64), pack(lengths.copy(), 64))


def test_a_record_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="65 positions does not fit a row of 64"):
        pack(np.array([3, 65, 2]), 64)


def filled_fraction(texts: list[tuple[str, str]], tokenizer, specials) -> float:
    """Return the filled fraction of rows of 512 in the joint layout with one predictor token."""
    layout = make_layout("joint", specials, pairing=Pairing(1))
    lengths = np.array(
        [[len(tokens) for tokens in tokenizer.encode_batch(list(view))] for view in zip(*texts, strict=True)]
    ).T
    positions = layout.segment_lengths(lengths, np.ones(len(texts), bool)).sum(axis=1)
    rows = pack(positions, ROW)
    return float(positions.sum() / ((rows.max() + 1) * ROW))


def test_rows_of_the_generated_corpus_are_full(tokenizer, specials):
    assert filled_fraction([generate(0, "train", index) for index in range(3000)], tokenizer, specials) > 0.97


def test_rows_of_nl_rx_synth_are_full(tokenizer, specials):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is missing")
    with (DATA / "train.jsonl").open(encoding="utf-8") as lines:
        messages = [
            {message["role"]: message["content"] for message in json.loads(line)["messages"]}
            for line in itertools.islice(lines, 4000)
        ]
    assert (
        filled_fraction([(message["user"], message["assistant"]) for message in messages], tokenizer, specials) > 0.97
    )
