"""Pieces of long documents: each token of a document is a target, and only the last piece has an end token."""

import numpy as np
import pytest

from data_prep.layout import Pairing, make_layout
from pretrain.data.batch import assemble
from pretrain.data.loader import Loader, Rows, count_targets
from tests.row_plans import plan

ROW = 16
PIECE = 14
"""Number of tokens of a piece that fills a row together with BOS and a continuation token."""


def cut_into_pieces(documents: list[list[int]], view: int) -> tuple[list[tuple[list[int], list[int]]], list[bool]]:
    """Return the pieces of the documents as records of one view, and the flags of continued records.

    A record with both views follows each document.
    """
    records, continues = [], []
    for document in documents:
        pieces = [document[first : first + PIECE] for first in range(0, len(document), PIECE)]
        records += [([], piece) if view else (piece, []) for piece in pieces] + [([9, 9], [8])]
        continues += [True] * (len(pieces) - 1) + [False, False]
    return records, continues


def expected_labels(documents: list[list[int]], specials) -> list[tuple[int, int]]:
    """Return (token at the predicting position, predicted token) for all labels, built token by token and sorted."""
    out = []
    for document in documents:
        for place, token in enumerate(document):
            if place % PIECE == 0:
                out.append((specials.bos, token))  # each piece begins with BOS
            if place:
                out.append((document[place - 1], token))
        out.append((document[-1], specials.eos))
    return sorted(out)


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("kind", ["joint", "independent"])
@pytest.mark.parametrize("lm_views", ["all", "last"])
def test_each_token_of_a_document_is_a_target_and_the_end_token_only_at_its_end(
    write_corpus, specials, kind, lm_views, view
):
    rng = np.random.default_rng(view)
    documents = [rng.integers(10, 500, length).tolist() for length in (1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 40)]
    records, continues = cut_into_pieces(documents, view)
    corpus = write_corpus(records, continues=continues)
    layout = make_layout(kind, specials, pairing=Pairing(1), lm_views=lm_views)
    every = np.arange(len(records))
    plain = every[[not all(record) for record in records]]
    rng.shuffle(plain)
    rows = plan(corpus, plain, layout, ROW, np.ones(len(plain), bool))
    batch = assemble(rows, corpus, layout, specials, ROW, 0)
    ids = batch.token_ids.flatten()
    found = sorted(zip(ids[batch.label_index].tolist(), batch.label_ids.tolist(), strict=True))
    assert found == expected_labels(documents, specials)
    assert count_targets(rows, layout) == len(found)
    assert ids.tolist().count(specials.eos) == len(documents)


def test_pieces_of_a_document_are_assembled_in_separate_batches(write_corpus, specials):
    documents = [list(range(10, 10 + 3 * PIECE))]
    records, continues = cut_into_pieces(documents, 0)
    corpus, layout = write_corpus(records, continues=continues), make_layout("joint", specials)
    alone = []
    for record in range(3):
        rows = plan(corpus, np.array([record]), layout, ROW, np.zeros(1, bool))
        alone += assemble(rows, corpus, layout, specials, ROW, 0).token_ids[0].tolist()
    assert alone == [
        specials.bos,
        *documents[0][: PIECE + 1],
        specials.bos,
        *documents[0][PIECE : 2 * PIECE + 1],
        specials.bos,
        *documents[0][2 * PIECE :],
        specials.eos,
    ]


def test_the_continuation_token_may_be_token_0(write_corpus, specials):
    document = [10] * PIECE + [0, 11]
    records, continues = cut_into_pieces([document], 0)
    corpus, layout = write_corpus(records, continues=continues), make_layout("joint", specials)
    rows = plan(corpus, np.array([0]), layout, ROW, np.zeros(1, bool))
    assert assemble(rows, corpus, layout, specials, ROW, 0).token_ids[0].tolist() == [
        specials.bos,
        *document[: PIECE + 1],
    ]


def test_a_loader_yields_each_end_token_once_per_epoch(write_corpus, specials):
    documents = [list(range(10, 10 + length)) for length in range(1, 60, 3)]
    records, continues = cut_into_pieces(documents, 0)
    corpus, layout = write_corpus(records, continues=continues), make_layout("joint", specials)
    rows = Rows.join([Loader(corpus, layout, ROW, seed=0, epochs=1).next_rows(200)], 200)
    batch = assemble(rows, corpus, layout, specials, ROW, 0)
    assert batch.label_ids.tolist().count(specials.eos) == 2 * len(documents)
