"""Terms of all ranks' pairs: every rank differentiates the pool with its own slice attached; together that is the single pool's gradient."""

from typing import NamedTuple

import pytest
import torch

from pretrain.data.batch import Batch
from pretrain.objectives.configs.regularizers import CodingRateConfig, SigregConfig, VicregConfig
from pretrain.objectives.llm_jepa import LlmJepa, info_nce_sum
from pretrain.objectives.monitors import embedding_monitors
from pretrain.objectives.pool import Gather, Pool, gather_pool
from pretrain.objectives.regularizers import build_regularizers
from tests.reference import Pair, info_nce

PAIRS, WIDTH, TEMPERATURE = 12, 8, 0.3
KEYS = [1, 2, 3, 1, 5, 6, 2, 8, 9, 10, 1, 12]
"""Pairs with the same key have the same target, wherever they are."""


SEED = torch.tensor(7)
vicreg_term, sigreg_term, rate_term = build_regularizers(
    [
        VicregConfig(name="vicreg", weight=1.0),
        SigregConfig(name="sigreg", weight=1.0, projections=16),
        CodingRateConfig(name="coding_rate", weight=1.0),
    ]
)
TERMS = {
    "info_nce": lambda pool: info_nce_sum(pool, TEMPERATURE),
    "vicreg": lambda pool: vicreg_term(pool, SEED),
    "sigreg": lambda pool: sigreg_term(pool, SEED),
    "coding_rate": lambda pool: rate_term(pool, SEED),
}


class Share(NamedTuple):
    """What one rank holds, padded."""

    prediction: torch.Tensor
    target: torch.Tensor
    key: torch.Tensor
    record: torch.Tensor
    valid: torch.Tensor


def shares(ranks: int, padding: int = 0, filling: float = 0.0) -> list[Share]:
    """The same twelve pairs over ranks, in order, each rank's padded by `padding` pairs of `filling`."""
    torch.manual_seed(0)
    prediction, target, key = torch.randn(PAIRS, WIDTH), torch.randn(PAIRS, WIDTH), torch.tensor(KEYS)
    size = PAIRS // ranks
    out = []
    for rank in range(ranks):
        mine = slice(rank * size, (rank + 1) * size)
        pad = torch.full((padding, WIDTH), filling)
        out.append(
            Share(
                torch.cat([prediction[mine], pad]).requires_grad_(),
                torch.cat([target[mine], pad + 1]).requires_grad_(),
                torch.cat([key[mine], torch.zeros(padding, dtype=torch.int64)]),
                torch.cat([torch.arange(PAIRS)[mine], torch.zeros(padding, dtype=torch.int64)]),
                torch.arange(size + padding) < size,
            )
        )
    return out


def pool_of(everyone: list[Share], rank: int) -> Pool:
    """What `gather_pool` makes on one rank, with the other ranks' tensors detached as a collective hands them over."""
    mine = everyone[rank]

    def packed(share: Share) -> list[torch.Tensor]:
        """The two tensors that a rank sends: embeddings, and what identifies them."""
        return [
            torch.cat([share.prediction, share.target], dim=1).detach(),
            torch.stack([share.key, share.record, torch.zeros_like(share.key), share.valid.long()], dim=1),
        ]

    def all_gather(tensor: torch.Tensor) -> torch.Tensor:
        which = next(
            number
            for number, value in enumerate(packed(mine))
            if value.shape == tensor.shape and torch.equal(value, tensor)
        )
        return torch.cat([packed(share)[which] for share in everyone])

    none = torch.zeros(0, dtype=torch.int64)
    batch = Batch(
        none,
        none,
        none,
        none,
        none,
        none,
        none,
        mine.key,
        mine.record,
        torch.zeros_like(mine.key),
        mine.valid,
        none,
        none,
    )
    return gather_pool(mine.prediction, mine.target, batch, Gather(all_gather, rank))


def losses_and_gradients(term: str, everyone: list[Share]) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Each rank's value, and the gradients of all valid pairs: every rank in its turn, as if alone."""
    values = []
    for rank in range(len(everyone)):
        value = TERMS[term](pool_of(everyone, rank))
        value.backward()
        values.append(value.item())
    gradients = [
        torch.cat([getattr(share, side).grad[share.valid] for share in everyone]) for side in ("prediction", "target")
    ]
    return values, *gradients


@pytest.fixture(scope="module")
def single() -> dict[str, tuple[list[float], torch.Tensor, torch.Tensor]]:
    return {term: losses_and_gradients(term, shares(1)) for term in TERMS}


def test_the_single_pool_of_info_nce_equals_the_loops_of_the_reference(single):
    single = single["info_nce"]
    [share] = shares(1)
    each = info_nce(
        [
            Pair(*pair, record, True)
            for record, pair in enumerate(zip(share.prediction, share.target, KEYS, strict=True))
        ],
        TEMPERATURE,
    )
    sum(each).backward()
    torch.testing.assert_close(single[0][0], sum(each).item(), rtol=1e-6, atol=0)
    torch.testing.assert_close(single[1], share.prediction.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(single[2], share.target.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("term", TERMS)
def test_ranks_together_have_the_value_and_the_gradient_of_the_single_pool(term, ranks, padding, single):
    single = single[term]
    values, prediction, target = losses_and_gradients(term, shares(ranks, padding, filling=0.5))
    torch.testing.assert_close(sum(values), single[0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(prediction, single[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(target, single[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("term", TERMS)
def test_without_the_other_ranks_targets_the_gradient_would_differ(term, single):
    """The pairs of other ranks matter here, so the equality above says something."""
    everyone = shares(3)
    for share in everyone:
        TERMS[term](pool_of([share], 0)).backward()
    alone = torch.cat([share.target.grad for share in everyone])
    assert (alone - single[term][2]).norm() > 0.1 * single[term][2].norm()


@pytest.mark.parametrize("filling", [0.0, 1e4, -3.0])
@pytest.mark.parametrize("term", TERMS)
def test_padding_has_no_influence_and_no_gradient(term, filling, single):
    everyone = shares(2, padding=2, filling=filling)
    values, prediction, _ = losses_and_gradients(term, everyone)
    torch.testing.assert_close(sum(values), single[term][0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(prediction, single[term][1], rtol=1e-5, atol=1e-6)
    for share in everyone:
        assert not share.prediction.grad[~share.valid].any() and not share.target.grad[~share.valid].any()


@pytest.mark.parametrize("term", TERMS)
def test_a_rank_without_pairs_still_takes_part(term):
    """It computes the same pool on padding alone: value 0, gradient 0, nothing undefined."""
    with_pairs, _ = shares(2, padding=1)
    empty = Share(
        torch.zeros(7, WIDTH, requires_grad=True),
        torch.ones(7, WIDTH, requires_grad=True),
        torch.zeros(7, dtype=torch.int64),
        torch.zeros(7, dtype=torch.int64),
        torch.zeros(7, dtype=torch.bool),
    )
    value = TERMS[term](pool_of([with_pairs, empty], 1))
    value.backward()
    assert value.item() == 0
    assert not empty.prediction.grad.any() and not empty.target.grad.any()


def test_equal_targets_are_no_negatives():
    """Two pairs of one target and nothing else: there is nothing to tell apart, so the loss is 0."""
    assert of_two_pairs(key=[4, 4]) == 0
    assert of_two_pairs(key=[4, 5]) == pytest.approx(2 * torch.log(torch.tensor(2.0)).item())


def test_targets_of_one_record_and_of_the_other_direction_are_no_negatives():
    assert of_two_pairs(key=[4, 5], record=[8, 8]) == of_two_pairs(key=[4, 5], direction=[0, 1]) == 0


def of_two_pairs(key, record=(0, 1), direction=(0, 0)) -> float:
    pool = Pool(
        torch.randn(2, WIDTH),
        torch.ones(2, WIDTH),
        torch.tensor(key),
        torch.tensor(record),
        torch.tensor(direction),
        torch.tensor([True, True]),
        slice(0, 2),
    )
    return info_nce_sum(pool, TEMPERATURE).item()


def test_an_equal_target_is_a_hit_of_retrieval():
    """Prediction 0 is nearest to target 1: a hit exactly where the two are the same target."""
    prediction = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    target = torch.tensor([[0.9, 0.5, 0.0], [1.0, 0.1, 0.0], [0.0, 0.0, 1.0]])
    valid = torch.ones(3, dtype=torch.bool)

    def retrieval(keys):
        return embedding_monitors(
            Pool(prediction, target, torch.tensor(keys), torch.arange(3), torch.zeros(3), valid, slice(0, 3))
        )["retrieval_at_1"]

    assert retrieval([1, 2, 3]) == pytest.approx(1 / 3)  # predictions 0 and 1 are nearest to each other's target
    assert retrieval([1, 1, 3]) == 1


def test_temperature_and_gradient_have_their_published_defaults():
    assert LlmJepa(1.0, "info_nce").temperature == 0.07
    assert not LlmJepa(1.0, "info_nce").stop_gradient, "the published form trains both sides"
    assert LlmJepa(1.0, "info_nce", temperature=0.5).temperature == 0.5


def test_pools_are_joined_in_order_and_detached():
    pools = []
    for size in (3, 2):
        prediction, target = torch.randn(2, size, WIDTH, requires_grad=True)
        numbers = torch.arange(size)
        pools.append(Pool(prediction, target, numbers, numbers + 10, numbers % 2, numbers > 0, slice(0, size)))
    joined = Pool.join([pool.detached() for pool in pools])
    for name in ("prediction", "target", "key", "record", "direction", "valid"):
        assert getattr(joined, name).tolist() == [value for pool in pools for value in getattr(pool, name).tolist()]
    assert joined.local_slice == slice(0, 0) and not joined.prediction.requires_grad and not joined.target.requires_grad
