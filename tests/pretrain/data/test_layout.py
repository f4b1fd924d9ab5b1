"""Layouts: their segment lengths, labels, spans and pairs, computed from the lengths of views."""

import itertools

import numpy as np
import pytest

from data_prep.shards import positions_needed
from pretrain.data.layout import BACKWARD, FORWARD, Pairing, make_layout
from pretrain.data.spans import draw_spans

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
def test_segment_lengths_of_records_with_and_without_a_pair(kind, k, expected, specials):
    layout = make_layout(kind, specials, pairing=Pairing(k))
    assert layout.segment_lengths(LENGTHS, PAIRED).tolist() == expected
    without_pairs = make_layout(kind, specials).segment_lengths(LENGTHS, PAIRED)
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
def test_targets_are_counted_whether_or_not_a_record_is_paired(kind, lm_views, pairs, expected, specials):
    layout = make_layout(kind, specials, pairing=Pairing(1) if pairs else None, lm_views=lm_views)
    assert layout.count_lm_targets(LENGTHS, layout.segment_lengths(LENGTHS, PAIRED)).tolist() == expected


@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_data_preparation_reserves_room_for_the_longest_layout(kind, specials):
    layout = make_layout(kind, specials, pairing=Pairing(12))  # the maximum that the configuration allows
    assert (layout.segment_lengths(LENGTHS, np.ones(3, bool)).sum(axis=1) <= positions_needed(LENGTHS)).all()


def test_an_unknown_layout_is_an_error(specials):
    with pytest.raises(ValueError, match="joint or independent"):
        make_layout("both", specials, pairing=Pairing(0))


@pytest.mark.parametrize(
    ("kind", "k", "expected"), [("joint", 0, [11, 7, 58]), ("joint", 2, [13, 9, 60]), ("independent", 2, [11, 8, 53])]
)
def test_positions_include_the_pair_segments(kind, k, expected, specials):
    assert make_layout(kind, specials, pairing=Pairing(k)).positions(LENGTHS).tolist() == expected


@pytest.mark.parametrize(
    ("kind", "expected"), [("joint", [[8], [5], [50]]), ("independent", [[5, 4], [3, 3], [42, 9]])]
)
def test_document_lengths_exclude_the_pair_segments(kind, expected, specials):
    layout = make_layout(kind, specials, pairing=Pairing(2))
    assert layout.document_lengths(layout.segment_lengths(LENGTHS, PAIRED)).tolist() == expected


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("joint", None),
        ("independent", None),
        ("joint", "three_points"),
        ("joint", "sub_span"),
        ("joint", "views"),
        ("independent", "three_points"),
        ("independent", "sub_span"),
    ],
)
def test_span_counts_equal_the_numbers_of_drawn_spans(kind, form, specials):
    """The counts agree for segments of any length, including lengths that no current record has."""
    layout = make_layout(kind, specials, spans=form)
    for lengths in itertools.product(range(5), repeat=2):
        segment_lengths = np.array([lengths])
        starts = np.cumsum(segment_lengths, axis=1) - segment_lengths
        drawn = len(draw_spans(layout, starts, segment_lengths, np.array([7], np.uint64))) if form else 0
        counted = layout.count_spans(np.repeat(segment_lengths, 3, axis=0))
        assert counted.tolist() == [drawn] * 3 and counted.dtype == np.int64


@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_counts_are_integers_for_every_segment(kind, specials):
    layout = make_layout(kind, specials, pairing=Pairing(2))
    lengths = layout.segment_lengths(LENGTHS, PAIRED)
    for index, segment in enumerate(layout.segments):
        targets = layout.count_segment_targets(segment, LENGTHS, lengths[:, index])
        assert targets.dtype == np.int64 and targets.shape == (len(LENGTHS),)
    assert lengths.dtype == layout.count_lm_targets(LENGTHS, lengths).dtype == np.int64


@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_a_pair_needs_its_flag_a_prediction_and_a_target(kind, specials):
    layout = make_layout(kind, specials, pairing=Pairing(1))
    [pair] = layout.read_outs
    for lengths in itertools.product(range(3), repeat=len(layout.segments)):
        for paired in (True, False):
            expected = paired and min(lengths[pair.prediction], lengths[pair.target]) > 0
            assert layout.pairs(np.array([lengths]), np.array([paired])).tolist() == [[expected]]
    none = make_layout(kind, specials).pairs(np.array([[3, 2]]), np.array([True]))
    assert none.shape == (1, 0) and none.dtype == bool


@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_read_outs_state_their_direction(kind, specials):
    directions = [
        read_out.direction for read_out in make_layout(kind, specials, pairing=Pairing(1, direction="both")).read_outs
    ]
    assert directions == [FORWARD, BACKWARD]
