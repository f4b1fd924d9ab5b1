"""The packed single forward equals separate unpadded forwards, in losses and in gradients; and it would not, were it wrong."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from pretrain.data.batch import Batch, assemble
from pretrain.data.layout import Layout, make_layout
from pretrain.data.loader import Loader, Rows, plan_rows
from pretrain.models.language_model import LanguageModel
from pretrain.objectives import total_loss
from pretrain.objectives.llm_jepa import LlmJepa
from pretrain.objectives.next_token import NextToken
from pretrain.objectives.pool import Gather
from tests.reference import Ids, reference_losses

TOLERANCE = 1e-5
MUTANT_IN_LOSSES, MUTANT_IN_GRADIENTS = 1e-3, 0.5
"""What a mistake in positions or mask must exceed, far above the tolerance."""
ROW = 96
WEIGHT = 0.7
TEMPERATURE = 0.2
ALONE = Gather(all_gather=lambda mine: mine, rank=0)


def random_records(seed: int, count: int = 9) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(seed)
    records = [([rng.randrange(5, 512) for _ in range(rng.randint(1, 16))], [rng.randrange(5, 512) for _ in range(rng.randint(1, 12))])
               for _ in range(count)]
    records[3] = (records[3][0], records[1][1])  # one target occurs twice
    return records


class Packed(NamedTuple):
    rows: Rows
    batch: Batch
    layout: Layout


def packed(corpus, specials, layout: Layout, paired: np.ndarray) -> Packed:
    rows = plan_rows(corpus, np.arange(len(corpus)), layout, ROW, paired)
    batch = assemble(rows, corpus, layout, specials, ROW, int(rows.paired.sum()) + 2)
    assert 1 < rows.count < len(corpus), "the test needs several rows with several records"
    return Packed(rows, batch, layout)


class Result(NamedTuple):
    losses: dict[str, float]
    gradients: dict[str, torch.Tensor]


def gradients(model: LanguageModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def one_forward(model: LanguageModel, packed: Packed, objective) -> Result:
    counts = {"lm": int(packed.layout.lm_targets(packed.rows.segment_lengths).sum()), "jepa": int(packed.rows.paired.sum())}
    terms = objective(model(packed.batch), packed.batch, model.logits, ALONE).terms
    loss = total_loss(terms, counts, objective.weights, ranks=1)
    losses = {"total": loss.item()} | {name: value.item() / counts[name] for name, value in terms.items()}
    return Result(losses, gradients(model, loss))


def separate_forwards(model: LanguageModel, records, specials, **settings) -> Result:
    predictor = None if model.predictor is None else model.predictor.weight
    losses = reference_losses(model.causal_lm, predictor, records, Ids(specials.bos, specials.eos, specials.sep), **settings)
    return Result({name: value.item() for name, value in losses._asdict().items()}, gradients(model, losses.total))


def error(result: Result, expected: Result) -> float:
    """The largest relative error of any loss and of any parameter's gradient, in the L2 norm."""
    assert result.gradients.keys() == expected.gradients.keys()
    of_losses = [abs(value - expected.losses[name]) / abs(expected.losses[name]) for name, value in result.losses.items()]
    of_gradients = [((gradient - expected.gradients[name]).norm() / expected.gradients[name].norm()).item()
                    for name, gradient in result.gradients.items()]
    return max(of_losses + of_gradients)


@pytest.mark.parametrize("lm_views", ["all", "last"])
@pytest.mark.parametrize("distance", ["cosine", "info_nce"])
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_losses_and_gradients_equal_separate_forwards(kind, k, distance, lm_views, make_model, write_corpus, specials):
    records = random_records(seed=k)
    model = make_model(k)
    layout = make_layout(kind, specials, pairs=True, predictor_tokens=k, lm_views=lm_views)
    result = one_forward(model, packed(write_corpus(records), specials, layout, np.ones(len(records), bool)),
                         LlmJepa(WEIGHT, distance, TEMPERATURE if distance == "info_nce" else None))
    expected = separate_forwards(model, records, specials, layout=kind, lm_views=lm_views, distance=distance, temperature=TEMPERATURE, weight=WEIGHT)
    assert set(expected.gradients) == {name for name, _ in model.named_parameters()}
    assert error(result, expected) < TOLERANCE


@pytest.mark.parametrize("distance", ["cosine", "info_nce"])
@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_records_that_dropout_leaves_out_take_no_part_in_the_pair_term(kind, distance, make_model, corpus, specials):
    model = make_model(2)
    layout = make_layout(kind, specials, pairs=True, predictor_tokens=2)
    loader = Loader(corpus, layout, 128, seed=3, dropout=0.5)
    rows = loader.next_rows(5)
    batch = assemble(rows, corpus, layout, specials, 128, int(rows.paired.sum()))
    assert 3 < rows.paired.sum() < len(rows.records) - 3
    result = one_forward(model, Packed(rows, batch, layout), LlmJepa(WEIGHT, distance, TEMPERATURE if distance == "info_nce" else None))
    records = [tuple(corpus.tokens(np.array([record]), view).tolist() for view in (0, 1)) for record in rows.records]
    expected = separate_forwards(model, records, specials, layout=kind, distance=distance, temperature=TEMPERATURE, weight=WEIGHT,
                                 paired=rows.paired.tolist())
    assert error(result, expected) < TOLERANCE


@pytest.mark.parametrize("lm_views", ["all", "last"])
@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_next_token_is_the_language_model_term_alone(kind, lm_views, make_model, write_corpus, specials):
    records = random_records(seed=5)
    model = make_model(0)
    layout = make_layout(kind, specials, pairs=False, lm_views=lm_views)
    result = one_forward(model, packed(write_corpus(records), specials, layout, np.zeros(len(records), bool)), NextToken())
    expected = separate_forwards(model, records, specials, layout=kind, lm_views=lm_views, paired=[False] * len(records))
    assert result.losses.keys() == {"total", "lm"}
    assert error(result, expected) < TOLERANCE


class Place(NamedTuple):
    """Where a segment of a record stands, and what a mutant may change there."""

    row: int
    begin: int
    end: int
    record_end: int
    batch: Batch

    @property
    def visible_until(self) -> torch.Tensor:
        return self.batch.visible_until[self.row, self.begin : self.end]

    @property
    def positions(self) -> torch.Tensor:
        return self.batch.positions[self.row, self.begin : self.end]


def segments(packed: Packed, batch: Batch, index: int) -> Iterator[Place]:
    """That segment of every record."""
    lengths = packed.rows.segment_lengths
    ends = packed.rows.start + lengths[:, : index + 1].sum(axis=1)
    record_ends = packed.rows.start + lengths.sum(axis=1)
    for row, end, length, record_end in zip(packed.rows.row, ends, lengths[:, index], record_ends, strict=True):
        yield Place(row, end - length, end, record_end, batch)


def positions_run_through_the_row(packed: Packed, batch: Batch) -> None:
    """Shows in the joint layout only, where predictor tokens move away from their context: RoPE is relative, so
    shifting a whole encoding changes nothing. tests/pretrain/data/test_batch.py checks the positions themselves."""
    batch.positions[:] = torch.arange(ROW)


def predictor_tokens_start_at_position_0(packed: Packed, batch: Batch) -> None:
    for place in segments(packed, batch, packed.layout.read_outs[0]):
        place.positions[:] = torch.arange(place.end - place.begin)


def the_next_record_sees_the_lone_target(packed: Packed, batch: Batch) -> None:
    for place in segments(packed, batch, packed.layout.read_outs[1]):
        place.visible_until[:] = ROW


def the_lone_target_sees_the_context(packed: Packed, batch: Batch) -> None:
    for place in segments(packed, batch, 0):
        place.visible_until[:] = place.record_end


def predictor_tokens_see_the_target(packed: Packed, batch: Batch) -> None:
    """In the joint layout only, where the target stands between the context and its predictor tokens."""
    for place in segments(packed, batch, 1):
        place.visible_until[:] = place.end + packed.layout.predictor_tokens


def the_target_does_not_see_the_context(packed: Packed, batch: Batch) -> None:
    """In the joint layout only."""
    for place in segments(packed, batch, 0):
        place.visible_until[:] = place.end


MUTANTS = [("joint", positions_run_through_the_row), ("joint", predictor_tokens_see_the_target), ("joint", the_target_does_not_see_the_context),
           *((kind, mutant) for kind in ("joint", "independent") for mutant in (
               predictor_tokens_start_at_position_0, the_next_record_sees_the_lone_target, the_lone_target_sees_the_context))]


@pytest.mark.parametrize("distance", ["cosine", "info_nce"])
@pytest.mark.parametrize(("kind", "mutant"), MUTANTS)
def test_a_wrong_position_or_mask_breaks_the_equality(kind, mutant, distance, make_model, write_corpus, specials):
    records = random_records(seed=7)
    model = make_model(1)
    right = packed(write_corpus(records), specials, make_layout(kind, specials, pairs=True, predictor_tokens=1), np.ones(len(records), bool))
    wrong = right._replace(batch=replace(right.batch, positions=right.batch.positions.clone(), visible_until=right.batch.visible_until.clone()))
    mutant(wrong, wrong.batch)
    objective = LlmJepa(WEIGHT, distance, TEMPERATURE if distance == "info_nce" else None)
    expected = separate_forwards(model, records, specials, layout=kind, distance=distance, temperature=TEMPERATURE, weight=WEIGHT)
    assert error(one_forward(model, right, objective), expected) < TOLERANCE
    result = one_forward(model, wrong, objective)
    assert error(result, expected) > MUTANT_IN_GRADIENTS
    of_losses = max(abs(value / expected.losses[name] - 1) for name, value in result.losses.items())
    assert of_losses > MUTANT_IN_LOSSES, "the gradients show it, the losses do not"
