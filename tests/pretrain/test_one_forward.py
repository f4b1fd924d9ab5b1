"""The packed forward pass has the losses and gradients of separate unpadded ones; wrong masks break the equality."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from data_prep.layout import Layout, Pairing, make_layout
from pretrain.data.batch import Batch, assemble
from pretrain.data.loader import Loader, Rows, count_pairs, loss_denominators
from pretrain.models.language_model import LanguageModel
from pretrain.models.layer_states import LayerStates
from pretrain.objectives.base import ForwardPass, total_loss
from pretrain.objectives.llm_jepa import LlmJepa
from pretrain.objectives.mlp import Mlp
from pretrain.objectives.next_token import NextToken
from pretrain.objectives.nextlat import NextLat
from pretrain.objectives.nitp import Nitp
from pretrain.objectives.pool import Gather
from tests.families import embedding_scale, family_cases
from tests.reference import Ids, Reference
from tests.row_plans import plan

TOLERANCE = 1e-5
MUTANT_IN_LOSSES, MUTANT_IN_GRADIENTS = 1e-3, 0.5
"""Smallest errors that a mistake in positions or the mask must cause, far above the tolerance."""
ROW = 96
WEIGHT = 0.7
TEMPERATURE = 0.2
ALONE = Gather(all_gather=lambda mine: mine, rank=0)


def random_records(seed: int, count: int = 9) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(seed)
    records = [
        (
            [rng.randrange(5, 512) for _ in range(rng.randint(1, 16))],
            [rng.randrange(5, 512) for _ in range(rng.randint(1, 12))],
        )
        for _ in range(count)
    ]
    records[3] = (records[3][0], records[1][1])  # one target occurs twice
    return records


class Packed(NamedTuple):
    rows: Rows
    batch: Batch
    layout: Layout


def packed(corpus, specials, layout: Layout, paired: np.ndarray) -> Packed:
    rows = plan(corpus, np.arange(len(corpus)), layout, ROW, paired)
    batch = assemble(rows, corpus, layout, specials, ROW, count_pairs(rows, layout) + 2)
    assert 1 < rows.count < len(corpus), "the test needs several rows with several records"
    return Packed(rows, batch, layout)


class Result(NamedTuple):
    losses: dict[str, float]
    gradients: dict[str, torch.Tensor]


def gradients(
    model: LanguageModel, loss: torch.Tensor, objective: torch.nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """Return the gradient of each parameter of the model and of the objective that has one."""
    parameters = dict(model.named_parameters())
    if objective is not None:
        parameters |= {f"objective.{name}": parameter for name, parameter in objective.named_parameters()}
    for parameter in parameters.values():
        parameter.grad = None
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}


def one_forward(model: LanguageModel, packed: Packed, objective) -> Result:
    divisors = loss_denominators(packed.rows, packed.layout, objective.units)
    with LayerStates(model, objective.layers).record() as layers:
        hidden = model(packed.batch)
    terms = objective(ForwardPass(packed.batch, hidden, layers, model, ALONE)).terms
    loss = total_loss(terms, divisors, objective.weights, ranks=1)
    losses = {"total": loss.item()} | {name: value.item() / divisors[name] for name, value in terms.items()}
    return Result(losses, gradients(model, loss, objective))


def make_reference(model: LanguageModel, specials, **settings) -> Reference:
    predictor = None if model.predictor is None else model.predictor.weight
    return Reference(
        model.causal_lm,
        predictor,
        Ids(specials.bos, specials.eos, specials.sep),
        weight=WEIGHT,
        temperature=TEMPERATURE,
        softcap=getattr(model.causal_lm.config, "final_logit_softcapping", None),
        scale=embedding_scale(model.causal_lm.config),
        **settings,
    )


def separate_forwards(model: LanguageModel, records, specials, objective=None, **settings) -> Result:
    paired = settings.pop("paired", None)
    losses = make_reference(model, specials, **settings).losses(records, paired)
    return Result(
        {name: value.item() for name, value in losses._asdict().items()}, gradients(model, losses.total, objective)
    )


def error(result: Result, expected: Result) -> float:
    """Return the largest relative error of a loss or of the gradient of a parameter, in the L2 norm."""
    assert result.gradients.keys() == expected.gradients.keys()
    loss_errors = [
        abs(value - expected.losses[name]) / abs(expected.losses[name]) for name, value in result.losses.items()
    ]
    gradient_errors = [
        ((gradient - expected.gradients[name]).norm() / expected.gradients[name].norm()).item()
        for name, gradient in result.gradients.items()
    ]
    return max(loss_errors + gradient_errors)


@pytest.mark.parametrize("lm_views", ["all", "last"])
@pytest.mark.parametrize("distance", ["cosine", "info_nce"])
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_losses_and_gradients_equal_separate_forwards(kind, k, distance, lm_views, make_model, write_corpus, specials):
    records = random_records(seed=k)
    model = make_model(k)
    layout = make_layout(kind, specials, pairing=Pairing(k), lm_views=lm_views)
    result = one_forward(
        model, packed(write_corpus(records), specials, layout, np.ones(len(records), bool)), jepa(distance)
    )
    expected = separate_forwards(model, records, specials, layout=kind, lm_views=lm_views, distance=distance)
    assert set(expected.gradients) == {name for name, _ in model.named_parameters()}
    assert error(result, expected) < TOLERANCE


def jepa(distance: str, **settings) -> LlmJepa:
    return LlmJepa(WEIGHT, distance, temperature=TEMPERATURE if distance == "info_nce" else None, **settings)


@pytest.mark.parametrize(
    ("family", "kind", "distance", "direction"),
    family_cases(["independent", "joint"], ["cosine", "l2", "mse", "info_nce"], ["forward", "backward", "both"]),
)
def test_every_family_distance_and_direction(family, kind, distance, direction, make_model, write_corpus, specials):
    """The sliding windows (6 positions) are shorter than some views."""
    check_equality(
        make_model(2, family=family),
        random_records(seed=11),
        kind,
        distance,
        write_corpus,
        specials,
        pairing=Pairing(2, "append", direction),
    )


def three_views(seed: int) -> list[tuple[list[int], ...]]:
    """Return records of three views, one of them without a view and one without two."""
    pairs, others = random_records(seed=seed), random_records(seed=seed + 1)
    records = [(*record, other[0][:4]) for record, other in zip(pairs, others, strict=True)]
    records[2], records[4] = (records[2][0], [], records[2][2]), ([], [], records[4][2])
    return records


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("placement", ["append", "prepend"])
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_three_views_and_prepended_predictor_tokens(kind, k, placement, direction, make_model, write_corpus, specials):
    check_equality(
        make_model(k),
        three_views(seed=12),
        kind,
        "info_nce",
        write_corpus,
        specials,
        pairing=Pairing(k, placement, direction),
    )


@pytest.mark.parametrize(("family", "k", "distance"), family_cases([0, 1, 3], ["cosine", "info_nce"]))
def test_targets_in_context(family, k, distance, make_model, write_corpus, specials):
    pairing = Pairing(k, in_context=True)
    for records in (random_records(seed=15), three_views(seed=16)):
        check_equality(
            make_model(k, family=family), records, "joint", distance, write_corpus, specials, pairing=pairing
        )


@pytest.mark.parametrize("distance", ["cosine", "info_nce"])
def test_stop_gradient_changes_the_gradient_but_not_the_loss(distance, make_model, write_corpus, specials):
    check_equality(
        make_model(1),
        random_records(seed=14),
        "joint",
        distance,
        write_corpus,
        specials,
        pairing=Pairing(1),
        stop_gradient=True,
    )


def check_equality(
    model, records, kind, distance, write_corpus, specials, *, pairing: Pairing, stop_gradient: bool = False
) -> None:
    layout = make_layout(kind, specials, views=len(records[0]), pairing=pairing)
    corpus = write_corpus(records)
    result = one_forward(
        model,
        packed(corpus, specials, layout, np.ones(len(records), bool)),
        jepa(distance, stop_gradient=stop_gradient),
    )
    settings = {
        "layout": kind,
        "distance": distance,
        "direction": pairing.direction,
        "placement": pairing.placement,
        "in_context": pairing.in_context,
    }
    assert (
        error(result, separate_forwards(model, records, specials, stop_gradient=stop_gradient, **settings)) < TOLERANCE
    )
    if stop_gradient:
        assert error(result, separate_forwards(model, records, specials, **settings)) > MUTANT_IN_GRADIENTS / 5


@pytest.mark.parametrize("distance", ["cosine", "info_nce"])
@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_dropped_records_are_excluded_from_the_jepa_term(kind, distance, make_model, corpus, specials):
    model = make_model(2)
    layout = make_layout(kind, specials, pairing=Pairing(2))
    loader = Loader(corpus, layout, 128, seed=3, dropout=0.5)
    rows = loader.next_rows(5)
    batch = assemble(rows, corpus, layout, specials, 128, int(rows.paired.sum()))
    assert 3 < rows.paired.sum() < len(rows.records) - 3
    result = one_forward(model, Packed(rows, batch, layout), jepa(distance))
    records = [tuple(corpus.tokens(np.array([record]), view).tolist() for view in (0, 1)) for record in rows.records]
    expected = separate_forwards(model, records, specials, layout=kind, distance=distance, paired=rows.paired.tolist())
    assert error(result, expected) < TOLERANCE


@pytest.mark.parametrize("lm_views", ["all", "last"])
@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_next_token_is_only_the_language_model_term(kind, lm_views, make_model, write_corpus, specials):
    records = random_records(seed=5)
    model = make_model(0)
    layout = make_layout(kind, specials, lm_views=lm_views)
    result = one_forward(
        model, packed(write_corpus(records), specials, layout, np.zeros(len(records), bool)), NextToken()
    )
    expected = separate_forwards(
        model, records, specials, layout=kind, lm_views=lm_views, paired=[False] * len(records)
    )
    assert result.losses.keys() == {"total", "lm"}
    assert error(result, expected) < TOLERANCE


def submodule(objective: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Return the weights below a submodule by their names in it."""
    return {key.removeprefix(f"{name}."): value for key, value in objective.named_parameters() if key.startswith(name)}


def documents_and_pairs(seed: int) -> list[tuple[list[int], ...]]:
    """Return records of which some have one view only, as plain documents have."""
    records: list[tuple[list[int], ...]] = list(random_records(seed=seed))
    records[2], records[5] = (records[2][0], []), (records[5][0], [])
    return records


@pytest.mark.parametrize(
    ("family", "layer", "kind", "lm_views"), family_cases([1, 2], ["independent", "joint"], ["last", "all"])
)
def test_nitp_equals_separate_forwards(family, layer, kind, lm_views, make_model, write_corpus, specials):
    records, model = documents_and_pairs(seed=21), make_model(0, family=family)
    torch.manual_seed(1)
    objective = Nitp(WEIGHT, layer, Mlp(model.hidden_size, 12, model.hidden_size))
    layout = make_layout(kind, specials, lm_views=lm_views)
    result = one_forward(
        model, packed(write_corpus(records), specials, layout, np.zeros(len(records), bool)), objective
    )
    mlp = submodule(objective, "projector.layers")
    reference = make_reference(model, specials, layout=kind, lm_views=lm_views, mlp=mlp)
    lm = reference.losses(records, [False] * len(records)).lm
    jepa = reference.nitp(records, layer)
    total = lm + WEIGHT * jepa
    losses = {"total": total.item(), "lm": lm.item(), "jepa": jepa.item()}
    assert error(result, Result(losses, gradients(model, total, objective))) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "kl_weight", "kind", "lm_views"), family_cases([0.0, 0.4], ["independent", "joint"], ["last", "all"])
)
def test_nextlat_equals_separate_forwards(family, kl_weight, kind, lm_views, make_model, write_corpus, specials):
    records, model = documents_and_pairs(seed=22), make_model(0, family=family)
    torch.manual_seed(1)
    objective = NextLat(WEIGHT, kl_weight, model.hidden_size)
    layout = make_layout(kind, specials, lm_views=lm_views)
    result = one_forward(
        model, packed(write_corpus(records), specials, layout, np.zeros(len(records), bool)), objective
    )
    mlp = submodule(objective, "dynamics.layers")
    reference = make_reference(model, specials, layout=kind, lm_views=lm_views, mlp=mlp)
    lm = reference.losses(records, [False] * len(records)).lm
    jepa, kl = reference.nextlat(records, submodule(objective, "norm"))
    total = lm + WEIGHT * jepa + kl_weight * kl
    losses = {"total": total.item(), "lm": lm.item(), "jepa": jepa.item(), "kl": kl.item()}
    assert result.losses.keys() == (losses.keys() if kl_weight else losses.keys() - {"kl"})
    assert error(result, Result(losses, gradients(model, total, objective))) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "pairing", "distance"),
    family_cases([Pairing(0), Pairing(1, in_context=True), Pairing(2)], ["cosine", "info_nce"]),
)
def test_a_predictor_mlp_equals_separate_forwards(family, pairing, distance, make_model, write_corpus, specials):
    k, in_context = pairing.predictor_tokens, pairing.in_context
    records, model = random_records(seed=23), make_model(k, family=family)
    torch.manual_seed(1)
    objective = jepa(distance, predictor=Mlp(model.hidden_size, 12, model.hidden_size))
    layout = make_layout("joint", specials, pairing=Pairing(k, in_context=in_context))
    result = one_forward(model, packed(write_corpus(records), specials, layout, np.ones(len(records), bool)), objective)
    settings = {"layout": "joint", "distance": distance, "in_context": in_context}
    mlp = submodule(objective, "predictor.layers")
    expected = separate_forwards(model, records, specials, objective, mlp=mlp, **settings)
    assert error(result, expected) < TOLERANCE


class RowSegment(NamedTuple):
    """One segment of a record in its row, with the tensors that a mutant may change there."""

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


def segments(packed: Packed, batch: Batch, index: int) -> Iterator[RowSegment]:
    """Yield the segment that has this index in the layout, for every record."""
    lengths = packed.rows.segment_lengths
    ends = packed.rows.start + lengths[:, : index + 1].sum(axis=1)
    record_ends = packed.rows.start + lengths.sum(axis=1)
    for row, end, length, record_end in zip(packed.rows.row, ends, lengths[:, index], record_ends, strict=True):
        yield RowSegment(row, end - length, end, record_end, batch)


def positions_run_through_the_row(packed: Packed, batch: Batch) -> None:
    """Number the positions through the row instead of restarting at each record.

    The losses change only in the joint layout, because predictor tokens move away from their context there. RoPE is
    relative, so a shift of a complete encoding has no effect. tests/pretrain/data/test_batch.py checks the positions
    themselves.
    """
    batch.positions[:] = torch.arange(ROW)


def predictor_tokens_start_at_position_0(packed: Packed, batch: Batch) -> None:
    for segment in segments(packed, batch, packed.layout.read_outs[0].prediction):
        segment.positions[:] = torch.arange(segment.end - segment.begin)


def the_next_record_sees_the_lone_target(packed: Packed, batch: Batch) -> None:
    for segment in segments(packed, batch, packed.layout.read_outs[0].target):
        segment.visible_until[:] = ROW


def the_lone_target_sees_the_context(packed: Packed, batch: Batch) -> None:
    for segment in segments(packed, batch, 0):
        segment.visible_until[:] = segment.record_end


def predictor_tokens_see_the_target(packed: Packed, batch: Batch) -> None:
    """Show the target to the predictor tokens; the joint layout puts it between them and the context."""
    for segment in segments(packed, batch, 1):
        segment.visible_until[:] = segment.end + packed.layout.predictor_tokens


def the_target_does_not_see_the_context(packed: Packed, batch: Batch) -> None:
    """Hide the context from the target, which sees it only in the joint layout."""
    for segment in segments(packed, batch, 0):
        segment.visible_until[:] = segment.end


MUTANTS = [
    ("joint", positions_run_through_the_row),
    ("joint", predictor_tokens_see_the_target),
    ("joint", the_target_does_not_see_the_context),
    *(
        (kind, mutant)
        for kind in ("joint", "independent")
        for mutant in (
            predictor_tokens_start_at_position_0,
            the_next_record_sees_the_lone_target,
            the_lone_target_sees_the_context,
        )
    ),
]


@pytest.mark.parametrize("distance", ["cosine", "info_nce"])
@pytest.mark.parametrize(("kind", "mutant"), MUTANTS)
def test_a_wrong_position_or_mask_breaks_the_equality(kind, mutant, distance, make_model, write_corpus, specials):
    records = random_records(seed=7)
    model = make_model(1)
    correct = packed(
        write_corpus(records), specials, make_layout(kind, specials, pairing=Pairing(1)), np.ones(len(records), bool)
    )
    wrong = correct._replace(
        batch=replace(
            correct.batch, positions=correct.batch.positions.clone(), visible_until=correct.batch.visible_until.clone()
        )
    )
    mutant(wrong, wrong.batch)
    objective = jepa(distance)
    expected = separate_forwards(model, records, specials, layout=kind, distance=distance)
    assert error(one_forward(model, correct, objective), expected) < TOLERANCE
    result = one_forward(model, wrong, objective)
    assert error(result, expected) > MUTANT_IN_GRADIENTS
    loss_error = max(abs(value / expected.losses[name] - 1) for name, value in result.losses.items())
    assert loss_error > MUTANT_IN_LOSSES, "the mistake should change the losses too, not only the gradients"
