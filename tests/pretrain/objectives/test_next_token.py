"""The language-model term, and the normalization of all terms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_prep.layout import Pairing, make_layout
from pretrain.data.batch import Batch, assemble
from pretrain.data.loader import Loader, Rows
from pretrain.objectives.base import ForwardPass, total_loss
from pretrain.objectives.llm_jepa import LlmJepa
from pretrain.objectives.next_token import NextToken, next_token_sum
from pretrain.objectives.pool import Gather

ALONE = Gather(all_gather=lambda mine: mine, rank=0)


@pytest.fixture(scope="module")
def batch(corpus, specials) -> Batch:
    layout = make_layout("joint", specials, pairing=Pairing(1))
    rows = Loader(corpus, layout, 128, seed=0).next_rows(3)
    return assemble(rows, corpus, layout, specials, 128, int(rows.paired.sum()))


def test_the_term_equals_the_cross_entropy_of_full_logits(batch, make_model):
    model = make_model(1)
    with torch.no_grad():
        hidden = model(batch)
        labels = torch.full((batch.token_ids.numel(),), -100)
        labels[batch.label_index] = batch.label_ids
        full = F.cross_entropy(model.logits(hidden), labels, ignore_index=-100, reduction="sum")
        torch.testing.assert_close(next_token_sum(hidden, batch, model.cross_entropy), full, rtol=1e-6, atol=0)


def test_the_head_gets_only_labelled_positions(batch, make_model):
    model, head_inputs = make_model(1), []

    class Head:
        def cross_entropy(self, hidden, label_ids):
            head_inputs.append(hidden)
            return model.cross_entropy(hidden, label_ids)

    with torch.no_grad():
        NextToken()(ForwardPass(batch, model(batch), {}, Head(), ALONE))
    assert [len(hidden) for hidden in head_inputs] == [len(batch.label_index)]


def test_rows_without_a_label_have_loss_0_and_gradient_0(corpus, specials, make_model):
    """A rank with empty rows can do the same work as its peers."""
    layout = make_layout("joint", specials, pairing=Pairing(1))
    rows = Loader(corpus, layout, 128, seed=0).next_rows(1)
    empty = assemble(Rows.join([rows], 3).select(1, 3), corpus, layout, specials, 128, 2)
    model = make_model(1)
    for distance in ("cosine", "info_nce"):
        objective = LlmJepa(1.0, distance)
        terms = objective(ForwardPass(empty, model(empty), {}, model, ALONE)).terms
        assert [value.item() for value in terms.values()] == [0, 0]
        model.zero_grad()
        total_loss(terms, {"lm": 0, "jepa": 0}, objective.weights, ranks=2).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_pool_is_gathered_on_request(batch, make_model):
    model = make_model(1)
    with torch.no_grad():
        hidden = model(batch)
        for objective, needs_pool in (
            (NextToken(), False),
            (LlmJepa(1.0, "cosine"), False),
            (LlmJepa(1.0, "info_nce"), True),
        ):
            assert (objective(ForwardPass(batch, hidden, {}, model, ALONE)).pool is not None) == needs_pool
            pool = objective(ForwardPass(batch, hidden, {}, model, ALONE), with_pool=True).pool
            torch.testing.assert_close(pool.prediction, hidden[batch.prediction_index])
            torch.testing.assert_close(pool.target, hidden[batch.target_index])


def test_each_term_is_normalised_by_its_own_global_count():
    terms = {"lm": torch.tensor(6.0), "jepa": torch.tensor(4.0)}
    assert total_loss(terms, {"lm": 12, "jepa": 8}, {"lm": 1.0, "jepa": 0.5}, ranks=1).item() == 6 / 12 + 0.5 * 4 / 8
    assert total_loss(terms, {"lm": 12, "jepa": 8}, {"lm": 1.0, "jepa": 0.5}, ranks=4).item() == 4 * (
        6 / 12 + 0.5 * 4 / 8
    )
    assert total_loss(terms, {"lm": 1, "jepa": 2}, {"lm": 1.0, "jepa": 1.0}, ranks=1).item() == 6 + 4 / 2
    assert np.isfinite(total_loss({"lm": torch.tensor(0.0)}, {"lm": 0}, {"lm": 1.0}, ranks=1).item())
