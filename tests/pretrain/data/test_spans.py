"""Spans stay within a document, have the configured form, and are drawn uniformly, independent of the packing."""

import itertools
from collections import Counter

import numpy as np
import pytest

from data_prep.layout import Pairing, make_layout
from pretrain.data.batch import assemble
from pretrain.data.loader import Loader, count_spans, draw_random_bits
from pretrain.data.spans import draw_spans

DOCUMENT = 6
"""Number of positions in the document whose spans are counted."""
DRAWS = 40_000


def draw_from_one_document(form: str, specials) -> np.ndarray:
    """Return many draws from a document of two views at position 100, relative to its start: (DRAWS, 3, 2)."""
    layout = make_layout("joint", specials, spans=form)
    lengths = np.tile([[DOCUMENT - 2, 2]], (DRAWS, 1))
    starts = np.tile([[100, 100 + DOCUMENT - 2]], (DRAWS, 1))
    return draw_spans(layout, starts, lengths, draw_random_bits(np.arange(DRAWS), 1, np.full(DRAWS, 2))) - 100


def assert_uniform(found: list[tuple], choices: set[tuple]) -> None:
    counted = Counter(found)
    assert set(counted) == choices
    expected = DRAWS / len(choices)
    chi_square = sum((count - expected) ** 2 / expected for count in counted.values())
    assert chi_square < len(choices) + 5 * (2 * len(choices)) ** 0.5


def test_three_points_are_drawn_uniformly_in_order(specials):
    spans = draw_from_one_document("three_points", specials)
    (r, t), (s, r_again), (empty_start, empty_end) = spans.transpose(1, 2, 0)
    assert (r == r_again).all() and (empty_start == empty_end).all()
    assert_uniform(
        list(zip(s.tolist(), r.tolist(), t.tolist(), strict=True)),
        {(s, r, t) for t in range(DOCUMENT) for r in range(t) for s in range(r)},
    )


def test_a_sub_span_is_any_proper_span_compared_with_the_remainder(specials):
    spans = draw_from_one_document("sub_span", specials)
    (a, b), (zero, a_again), (b_again, last) = spans.transpose(1, 2, 0)
    assert (a == a_again).all() and (b == b_again).all() and (zero == 0).all() and (last == DOCUMENT - 1).all()
    assert_uniform(
        list(zip(a.tolist(), b.tolist(), strict=True)),
        {(a, b) for b in range(DOCUMENT) for a in range(b)} - {(0, DOCUMENT - 1)},
    )


def test_spans_of_the_form_views_reach_the_end_of_each_view(specials):
    spans = draw_from_one_document("views", specials)
    assert (spans == [[3, 5], [0, 3], [3, 3]]).all()


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("joint", "three_points"),
        ("joint", "sub_span"),
        ("joint", "views"),
        ("independent", "three_points"),
        ("independent", "sub_span"),
    ],
)
@pytest.mark.parametrize("pairing", [None, Pairing(2)])
def test_each_document_has_one_span_that_stays_within_it(kind, form, pairing, corpus, specials):
    layout = make_layout(kind, specials, pairing=pairing, spans=form)
    rows = Loader(corpus, layout, 128, seed=5, dropout=0.4).next_rows(20)
    batch = assemble(rows, corpus, layout, specials, 128, 1000)
    spans = batch.span_index.numpy()
    documents = len(rows.records) * (1 if kind == "joint" else 2)
    assert len(spans) == documents == count_spans(rows, layout)
    tokens = batch.token_ids.flatten().numpy()
    # Each document begins with BOS. The lone target of the joint layout does not, but it is the end of its record.
    document_of = np.cumsum(tokens == specials.bos)
    inside = spans.reshape(documents, -1)
    assert (document_of[inside] == document_of[inside[:, :1]]).all()
    assert len(set(document_of[inside[:, 0]])) == documents
    assert (tokens[inside] < specials.predictor).all()


def test_the_remaining_view_of_a_record_is_a_document(write_corpus, specials):
    corpus = write_corpus([([11, 12, 13], [21, 22]), ([], [31, 32]), ([41], [])])
    for form, spans in (("three_points", 3), ("sub_span", 3), ("views", 1)):
        layout = make_layout("joint", specials, spans=form)
        rows = Loader(corpus, layout, 32, seed=0).next_rows(1)
        assert count_spans(rows, layout) == len(assemble(rows, corpus, layout, specials, 32, 0).span_index) == spans


def test_the_span_of_a_record_depends_on_the_epoch_and_not_on_the_packing(corpus, specials):
    layout = make_layout("joint", specials, spans="sub_span")

    def relative_spans(epoch: int, row_length: int) -> dict[int, list]:
        loader = Loader(corpus, layout, row_length, seed=5)
        loader.load_state({"epoch": epoch, "window": 0, "row": 0})
        rows = loader.next_rows(40 if row_length == 128 else 20)
        spans = assemble(rows, corpus, layout, specials, row_length, 0).span_index.numpy()
        starts = rows.row * row_length + rows.start
        return {
            record: (span - start).tolist()
            for record, span, start in zip(rows.records.tolist(), spans, starts, strict=True)
        }

    one, other, later = relative_spans(0, 128), relative_spans(0, 256), relative_spans(1, 256)
    common = one.keys() & other.keys()
    assert len(common) > 20 and all(one[record] == other[record] for record in common)
    again = other.keys() & later.keys()
    assert len(again) > 20 and sum(other[record] != later[record] for record in again) > len(again) / 2


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
