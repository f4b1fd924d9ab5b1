"""The layouts: what they cost and label, counted from lengths alone."""

import numpy as np
import pytest

from data_prep.shards import positions_needed
from pretrain.data.layout import Pairing, make_layout

LENGTHS = np.array([[3, 2], [1, 1], [40, 7]])
PAIRED = np.array([True, False, True])


@pytest.mark.parametrize(("kind", "k", "expected"), [
    ("joint", 0, [[5, 3, 3], [3, 2, 0], [42, 8, 8]]), ("joint", 2, [[5, 3, 2, 3], [3, 2, 0, 0], [42, 8, 2, 8]]),
    ("independent", 0, [[5, 4], [3, 3], [42, 9]]), ("independent", 2, [[5, 2, 4], [3, 0, 3], [42, 2, 9]])])
def test_a_record_costs_its_segments_and_without_a_pair_only_the_language_model_stream(kind, k, expected, specials):
    layout = make_layout(kind, specials, pairing=Pairing(k))
    assert layout.segment_lengths(LENGTHS, PAIRED).tolist() == expected
    alone = make_layout(kind, specials).segment_lengths(LENGTHS, PAIRED)
    assert alone.tolist() == [[context + 2, target + (1 if kind == "joint" else 2)] for context, target in LENGTHS]


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize(("kind", "lm_views", "expected"), [
    ("joint", "all", [7, 4, 49]), ("joint", "last", [3, 2, 8]), ("independent", "all", [7, 4, 49]), ("independent", "last", [3, 2, 8])])
def test_targets_are_counted_whether_or_not_a_record_is_paired(kind, lm_views, pairs, expected, specials):
    layout = make_layout(kind, specials, pairing=Pairing(1) if pairs else None, lm_views=lm_views)
    assert layout.lm_targets(LENGTHS, layout.segment_lengths(LENGTHS, PAIRED)).tolist() == expected


@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_data_preparation_keeps_room_for_the_most_demanding_layout(kind, specials):
    layout = make_layout(kind, specials, pairing=Pairing(12))  # the most that the configuration allows
    assert (layout.segment_lengths(LENGTHS, np.ones(3, bool)).sum(axis=1) <= positions_needed(LENGTHS)).all()


def test_an_unknown_layout_is_an_error(specials):
    with pytest.raises(ValueError, match="joint or independent"):
        make_layout("both", specials, pairing=Pairing(0))
