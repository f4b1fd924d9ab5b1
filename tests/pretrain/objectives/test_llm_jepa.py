"""LLM-JEPA on given hidden states: distances, gradients and regularizers equal the loops of the reference."""

import pytest
import torch

from data_prep.layout import BACKWARD, FORWARD
from pretrain.config import load_config
from pretrain.data.batch import Batch
from pretrain.data.loader import count_pairs, count_targets
from pretrain.objectives.base import ForwardPass, ModelShape, build_objective
from pretrain.objectives.llm_jepa import LlmJepa
from pretrain.objectives.pool import Gather
from pretrain.objectives.regularizers import coding_rate_gap, sigreg, vicreg
from tests.commands import ROOT
from tests.reference import Ids, Pair, Reference

ALONE = Gather(all_gather=lambda mine: mine, rank=0)
POSITIONS, WIDTH, PAIRS, PADDING = 40, 6, 9, 3
KEYS = [1, 2, 3, 1, 5, 6, 7, 2, 9]
RECORDS = [10, 11, 12, 13, 14, 14, 16, 17, 17]
DIRECTIONS = [FORWARD, FORWARD, BACKWARD, FORWARD, FORWARD, BACKWARD, BACKWARD, FORWARD, FORWARD]


def build(settings: str) -> LlmJepa:
    config = load_config(ROOT / "configs" / "demo.yaml", [f"objective={{name: llm_jepa, {settings}}}"])
    return build_objective(config.objective, ModelShape(WIDTH, 4))


class FakeHead:
    def cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return a stand-in for the loss of the head that depends on each label and hidden state."""
        return (hidden.square().sum(dim=1) * (1 + labels)).sum()


@pytest.fixture
def batch() -> Batch:
    positions = torch.randperm(POSITIONS, generator=torch.Generator().manual_seed(1))
    pad = [0] * PADDING
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        none,
        none,
        none,
        label_index=positions[:7],
        label_ids=torch.arange(7),
        prediction_index=torch.cat([positions[7:16], torch.tensor(pad)]),
        target_index=torch.cat([positions[16:25], torch.tensor(pad)]),
        pair_target_hash=torch.tensor(KEYS + pad),
        pair_record=torch.tensor(RECORDS + pad),
        pair_direction=torch.tensor(DIRECTIONS + pad),
        pair_valid=torch.arange(PAIRS + PADDING) < PAIRS,
        end_index=none,
        end_of_first=none.bool(),
        end_valid=none.bool(),
        span_index=none,
        seed=torch.tensor(3),
    )


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(POSITIONS, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()


@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize(
    ("settings", "distance", "temperature"),
    [
        ("distance: cosine", "cosine", 0.0),
        ("distance: l2", "l2", 0.0),
        ("distance: mse", "mse", 0.0),
        ("distance: info_nce", "info_nce", 0.07),
        ("distance: info_nce, temperature: 0.5", "info_nce", 0.5),
    ],
)
def test_each_distance_and_its_gradient_equal_the_reference(
    settings, distance, temperature, stop_gradient, batch, hidden
):
    terms = build(f"{settings}, stop_gradient: {str(stop_gradient).lower()}")(
        ForwardPass(batch, hidden, {}, FakeHead(), ALONE)
    ).terms
    reference = Reference(None, None, Ids(0, 0, 0), "joint", distance=distance, temperature=temperature)
    pairs = []
    for index in range(PAIRS):
        prediction, target = hidden[batch.prediction_index[index]], hidden[batch.target_index[index]]
        pairs.append(
            Pair(
                prediction,
                target.detach() if stop_gradient else target,
                [KEYS[index]],
                RECORDS[index],
                DIRECTIONS[index] == FORWARD,
            )
        )
    expected = sum(reference.distances(pairs))
    torch.testing.assert_close(terms["jepa"], expected)
    torch.testing.assert_close(torch.autograd.grad(terms["jepa"], hidden), torch.autograd.grad(expected, hidden))
    lm = sum(
        hidden[index].square().sum() * (1 + label)
        for index, label in zip(batch.label_index.tolist(), batch.label_ids.tolist(), strict=True)
    )
    torch.testing.assert_close(terms["lm"], lm)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ("{name: vicreg, weight: 2}", lambda cloud: vicreg(cloud, torch.ones(PAIRS, dtype=torch.bool), 0.04)),
        (
            "{name: vicreg, weight: 2, covariance: 0.5}",
            lambda cloud: vicreg(cloud, torch.ones(PAIRS, dtype=torch.bool), 0.5),
        ),
        (
            "{name: sigreg, weight: 2}",
            lambda cloud: sigreg(cloud, torch.ones(PAIRS, dtype=torch.bool), 256, torch.tensor(3)),
        ),
        (
            "{name: sigreg, weight: 2, projections: 5}",
            lambda cloud: sigreg(cloud, torch.ones(PAIRS, dtype=torch.bool), 5, torch.tensor(3)),
        ),
        (
            "{name: coding_rate, weight: 2}",
            lambda cloud: coding_rate_gap(cloud, torch.ones(PAIRS, dtype=torch.bool), 0.05),
        ),
        (
            "{name: coding_rate, weight: 2, precision: 0.2}",
            lambda cloud: coding_rate_gap(cloud, torch.ones(PAIRS, dtype=torch.bool), 0.2),
        ),
    ],
)
def test_a_regularizer_acts_on_predictions_and_targets_separately(settings, loss, batch, hidden):
    objective = build(f"weight: 3, regularizers: [{settings}]")
    name = settings.split(":")[1].split(",")[0].strip()
    assert objective.weights == {"lm": 1.0, "jepa": 3.0, name: 2.0}
    assert objective.units == {"lm": count_targets, "jepa": count_pairs, name: count_pairs}
    clouds = hidden[batch.prediction_index[:PAIRS]], hidden[batch.target_index[:PAIRS]]
    expected = PAIRS * sum(loss(cloud) for cloud in clouds)
    found = objective(ForwardPass(batch, hidden, {}, FakeHead(), ALONE)).terms[name]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, hidden), torch.autograd.grad(expected, hidden))


@pytest.mark.parametrize(
    ("settings", "needs_pool"),
    [
        ("distance: cosine", False),
        ("distance: info_nce", True),
        ("regularizers: [{name: coding_rate, weight: 1}]", True),
    ],
)
def test_pairs_are_gathered_only_if_a_term_or_the_caller_needs_them(settings, needs_pool, batch, hidden):
    objective = build(settings)
    assert (objective(ForwardPass(batch, hidden, {}, FakeHead(), ALONE)).pool is not None) == needs_pool
    pool = objective(ForwardPass(batch, hidden, {}, FakeHead(), ALONE), with_pool=True).pool
    assert torch.equal(pool.prediction, hidden[batch.prediction_index]) and torch.equal(
        pool.target, hidden[batch.target_index]
    )
    assert pool.key.tolist() == batch.pair_target_hash.tolist() and pool.record.tolist() == batch.pair_record.tolist()
    assert pool.direction.tolist() == batch.pair_direction.tolist() and torch.equal(pool.valid, batch.pair_valid)
