"""Regularizers alone: equal to separate forward passes of each record, on any number of ranks."""

import numpy as np
import pytest
import torch

from data_prep.layout import make_layout
from pretrain.data.batch import micro_batches
from pretrain.data.loader import Loader, count_ends, count_targets, loss_denominators
from pretrain.objectives.base import ForwardPass, total_loss
from pretrain.objectives.configs.regularizers import CodingRateConfig, SigregConfig, VicregConfig
from pretrain.objectives.pool import Gather
from pretrain.objectives.regularized import Regularized
from pretrain.objectives.regularizers import build_regularizers, coding_rate_gap, vicreg
from tests.families import embedding_scale, family_cases
from tests.reference import Ids, Reference

ROW = 96
CONFIGS = [CodingRateConfig(name="coding_rate", weight=0.5), VicregConfig(name="vicreg", weight=0.2)]


@pytest.fixture
def records() -> list[tuple[list[int], ...]]:
    generator = np.random.default_rng(4)
    draw = lambda most: generator.integers(5, 512, generator.integers(1, most)).tolist()  # noqa: E731
    pairs = [(draw(16), draw(12)) for _ in range(11)]
    pairs[2], pairs[7] = (pairs[2][0], []), ([], pairs[7][1])  # plain documents
    return pairs


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def packed_on_ranks(model, corpus, layout, specials, ranks: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Return the mean terms and the gradients of one micro step of four rows, divided among simulated ranks."""
    objective = Regularized(build_regularizers(CONFIGS))
    rows = Loader(corpus, layout, ROW, seed=0, epochs=1).next_rows(4)
    counts = loss_denominators(rows, layout, objective.units)
    batches = [
        next(micro_batches(rows, corpus, layout, specials, ROW, micro_batch_rows=4 // ranks, rank=rank, ranks=ranks))
        for rank in range(ranks)
    ]
    with torch.no_grad():
        ends = [model(batch)[batch.end_index].float() for batch in batches]
    flags = [torch.stack([batch.end_valid, batch.end_of_first], dim=1).long() for batch in batches]

    def all_gather(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(ends if tensor.dtype == torch.float32 else flags)

    losses: dict[str, float] = dict.fromkeys(objective.units, 0.0)
    total: dict[str, torch.Tensor] = {}
    for rank, batch in enumerate(batches):
        terms = objective(ForwardPass(batch, model(batch), {}, model, Gather(all_gather, rank))).terms
        assert terms.keys() == losses.keys()
        for name, value in terms.items():
            losses[name] += value.item() / counts[name]
        for name, gradient in gradients(model, total_loss(terms, counts, objective.weights, ranks)).items():
            total[name] = total.get(name, 0) + gradient / ranks  # as DeepSpeed averages them
    return losses, total


@pytest.mark.parametrize(("family", "kind", "ranks"), family_cases(["independent", "joint"], [1, 4, 2]))
def test_terms_and_gradients_equal_separate_forwards(family, kind, ranks, records, make_model, write_corpus, specials):
    model = make_model(0, family=family)
    layout = make_layout(kind, specials, ends=True)
    assert layout.segments == make_layout(kind, specials).segments, "the ends must need no token"
    losses, packed_gradients = packed_on_ranks(model, write_corpus(records), layout, specials, ranks)

    reference = Reference(
        model.causal_lm,
        None,
        Ids(specials.bos, specials.eos, specials.sep),
        layout=kind,
        softcap=getattr(model.causal_lm.config, "final_logit_softcapping", None),
        scale=embedding_scale(model.causal_lm.config),
    )
    first, later = [], []
    for views in records:
        present = [view for view in views if view]
        for text, start in reference.documents(present):
            reference.read(text, start)
        for number in range(len(present)):
            tokens = reference.through(present, number) if kind == "joint" else reference.alone(present, number)
            (later if number else first).append(reference.hidden_states(tokens)[-1])
    lm = sum(reference.cross_entropies) / len(reference.cross_entropies)
    groups = [(torch.stack(group), torch.ones(len(group), dtype=torch.bool)) for group in (first, later)]
    rate = sum(coding_rate_gap(*group, precision=0.05) for group in groups)
    variance = sum(vicreg(*group, covariance=0.04) for group in groups)
    for name, value in (("lm", lm), ("coding_rate", rate), ("vicreg", variance)):
        assert losses[name] == pytest.approx(value.item(), rel=1e-5)
    for name, gradient in gradients(model, lm + 0.5 * rate + 0.2 * variance).items():
        assert (packed_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_documents_alone_have_only_first_ends(make_model, write_corpus, specials):
    layout = make_layout("joint", specials, views=1, ends=True)
    corpus = write_corpus([([5 + number],) for number in range(6)])
    rows = Loader(corpus, layout, ROW, seed=0, epochs=1).next_rows(4)
    assert count_ends(rows, layout) == 6 and count_targets(rows, layout) == 12
    [batch] = micro_batches(rows, corpus, layout, specials, ROW, micro_batch_rows=4, rank=0, ranks=1)
    model, alone = make_model(0), Gather(lambda mine: mine, 0)
    regularizers = build_regularizers([*CONFIGS, SigregConfig(name="sigreg", weight=1.0)])
    terms = Regularized(regularizers)(ForwardPass(batch, model(batch), {}, model, alone)).terms
    ends = model(batch)[batch.end_index[batch.end_valid]]
    assert terms["coding_rate"].item() / 6 == pytest.approx(
        coding_rate_gap(ends, torch.ones(6, dtype=torch.bool), 0.05).item(), rel=1e-5
    )
    assert all(value.isfinite() for value in terms.values())
