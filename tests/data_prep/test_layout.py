"""Layouts: their segment lengths, labels and pairs, and the positions that a record needs, from view lengths."""

import itertools

import numpy as np
import pytest

from data_prep.layout import (
    BACKWARD,
    FORWARD,
    MAX_PREDICTOR_TOKENS,
    Pairing,
    SpecialTokenIds,
    make_layout,
    positions_needed,
    present_first,
)

SPECIALS = SpecialTokenIds(pad=0, bos=1, eos=2, sep=3, predictor=400)
LENGTHS = np.array([[3, 2], [1, 1], [40, 7]])
PAIRED = np.array([True, False, True])


@pytest.mark.parametrize(
    ("kind", "k", "expected"),
    [
        ("joint", 0, [[5, 3, 3], [3, 2, 0], [42, 8, 8]]),
        ("joint", 2, [[5, 3, 2, 3], [3, 2, 0, 0], [42, 8, 2, 8]]),
        ("independent", 0, [[5, 4], [3, 3], [42, 9]]),
        ("independent", 2, [[5, 2, 4], [3, 0, 3], [42, 2, 9]]),
    ],
)
def test_segment_lengths_of_records_with_and_without_a_pair(kind, k, expected):
    layout = make_layout(kind, SPECIALS, pairing=Pairing(k))
    assert layout.segment_lengths(LENGTHS, PAIRED).tolist() == expected
    without_pairs = make_layout(kind, SPECIALS).segment_lengths(LENGTHS, PAIRED)
    assert without_pairs.tolist() == [
        [context + 2, target + (1 if kind == "joint" else 2)] for context, target in LENGTHS
    ]


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize(
    ("kind", "lm_views", "expected"),
    [
        ("joint", "all", [7, 4, 49]),
        ("joint", "last", [3, 2, 8]),
        ("independent", "all", [7, 4, 49]),
        ("independent", "last", [3, 2, 8]),
    ],
)
def test_targets_are_counted_whether_or_not_a_record_is_paired(kind, lm_views, pairs, expected):
    layout = make_layout(kind, SPECIALS, pairing=Pairing(1) if pairs else None, lm_views=lm_views)
    assert layout.count_lm_targets(LENGTHS, layout.segment_lengths(LENGTHS, PAIRED)).tolist() == expected


@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_data_preparation_reserves_room_for_the_longest_layout(kind):
    layout = make_layout(kind, SPECIALS, pairing=Pairing(MAX_PREDICTOR_TOKENS))
    assert (layout.segment_lengths(LENGTHS, np.ones(3, bool)).sum(axis=1) <= positions_needed(LENGTHS)).all()


def slow_positions_needed(lengths: list[int]) -> int:
    """Return the positions that one record needs, from the description of the joint layout.

    It has every present view once and every present view except the first a second time, each with an end token. The
    first view begins with a special token. Each view except the last is followed by predictor tokens.
    """
    present = [length for length in lengths if length]
    if not present:
        return 0
    text = 1 + sum(length + 1 for length in present)
    targets = sum(length + 1 for length in present[1:])
    return text + targets + 12 * (len(present) - 1)


@pytest.mark.parametrize("views", range(1, 6))
def test_the_positions_needed_equal_the_slow_count_whichever_views_are_absent(views):
    generator = np.random.default_rng(views)
    lengths = generator.integers(1, 1000, (2000, views)) * (generator.random((2000, views)) < 0.6)
    assert {tuple(row) for row in (lengths > 0).tolist()} == set(itertools.product((False, True), repeat=views))
    needed = positions_needed(lengths)
    assert needed.tolist() == [slow_positions_needed(record) for record in lengths.tolist()]
    assert needed.dtype == np.int64 and positions_needed(lengths[:0]).shape == (0,)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("views", [2, 3, 4])
def test_targets_in_context_need_no_copy(views, k):
    stream = make_layout("joint", SPECIALS, views=views)
    layout = make_layout("joint", SPECIALS, views=views, pairing=Pairing(k, in_context=True))
    assert layout.segments[:views] == stream.segments and layout.documents == stream.documents
    lengths = np.array([[3, 4, 5, 6][:views], [3, *[0] * (views - 1)]])
    both = np.ones(2, bool)
    assert (layout.positions(lengths) - stream.positions(lengths)).tolist() == [k * (views - 1), 0]
    assert layout.pairs(layout.segment_lengths(lengths, both), both).sum(axis=1).tolist() == [views - 1, 0]
    for number, pair in enumerate(layout.read_outs):
        predicting = layout.segments[pair.prediction]
        assert pair.target == number + 1 and pair.direction == FORWARD
        assert predicting.parent == number if k else pair.prediction == number
    parents = [segment.parent for segment in layout.segments[views:]]
    assert parents == sorted(parents, reverse=True), "a subtree must be contiguous"


def test_present_views_come_first_in_their_order():
    assert present_first(np.array([[0, 4, 0, 2], [1, 1, 1, 1], [0, 0, 0, 3]])).tolist() == [
        [1, 3, 0, 2],
        [0, 1, 2, 3],
        [3, 0, 1, 2],
    ]
    many = np.arange(1000) % 2  # a sort that is not stable changes the order of so many columns
    assert present_first(many[None]).tolist() == [[*range(1, 1000, 2), *range(0, 1000, 2)]]


@pytest.mark.parametrize("pairing", [Pairing(), Pairing(2), Pairing(2, "prepend", "both")])
@pytest.mark.parametrize("views", [2, 3])
def test_a_separate_segment_has_the_view_and_its_special_tokens_alone(views, pairing):
    joint, independent = (
        make_layout(kind, SPECIALS, views=views, pairing=pairing) for kind in ("joint", "independent")
    )
    for view in range(views):
        first, later = (((SPECIALS.bos,), (SPECIALS.sep,)), ((), (SPECIALS.eos,)))
        segment = joint.separate_segment(view)
        assert segment.view == view and (segment.prefix, segment.suffix) == (later if view else first)
        segment = independent.separate_segment(view)
        assert segment.view == view and (segment.prefix, segment.suffix) == ((SPECIALS.bos,), (SPECIALS.eos,))
        for layout in (joint, independent):
            targets = [layout.segments[pair.target] for pair in layout.read_outs]
            assert all(target == layout.separate_segment(target.view) for target in targets)


def test_an_unknown_layout_is_an_error():
    with pytest.raises(ValueError, match="joint or independent"):
        make_layout("both", SPECIALS, pairing=Pairing(0))


@pytest.mark.parametrize(
    ("kind", "k", "expected"), [("joint", 0, [11, 7, 58]), ("joint", 2, [13, 9, 60]), ("independent", 2, [11, 8, 53])]
)
def test_positions_include_the_pair_segments(kind, k, expected):
    assert make_layout(kind, SPECIALS, pairing=Pairing(k)).positions(LENGTHS).tolist() == expected


@pytest.mark.parametrize(
    ("kind", "expected"), [("joint", [[8], [5], [50]]), ("independent", [[5, 4], [3, 3], [42, 9]])]
)
def test_document_lengths_exclude_the_pair_segments(kind, expected):
    layout = make_layout(kind, SPECIALS, pairing=Pairing(2))
    assert layout.document_lengths(layout.segment_lengths(LENGTHS, PAIRED)).tolist() == expected


@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_counts_are_integers_for_every_segment(kind):
    layout = make_layout(kind, SPECIALS, pairing=Pairing(2))
    lengths = layout.segment_lengths(LENGTHS, PAIRED)
    for index, segment in enumerate(layout.segments):
        targets = layout.count_segment_targets(segment, LENGTHS, lengths[:, index])
        assert targets.dtype == np.int64 and targets.shape == (len(LENGTHS),)
    assert lengths.dtype == layout.count_lm_targets(LENGTHS, lengths).dtype == np.int64


@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_a_pair_needs_its_flag_a_prediction_and_a_target(kind):
    layout = make_layout(kind, SPECIALS, pairing=Pairing(1))
    [pair] = layout.read_outs
    for lengths in itertools.product(range(3), repeat=len(layout.segments)):
        for paired in (True, False):
            expected = paired and min(lengths[pair.prediction], lengths[pair.target]) > 0
            assert layout.pairs(np.array([lengths]), np.array([paired])).tolist() == [[expected]]
    none = make_layout(kind, SPECIALS).pairs(np.array([[3, 2]]), np.array([True]))
    assert none.shape == (1, 0) and none.dtype == bool


@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_read_outs_state_their_direction(kind):
    directions = [
        read_out.direction for read_out in make_layout(kind, SPECIALS, pairing=Pairing(1, direction="both")).read_outs
    ]
    assert directions == [FORWARD, BACKWARD]
