"""Terms over the pairs of all ranks.

Each rank differentiates the pool only through its own slice. Together, the ranks have the gradient of a single pool.
"""

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
"""Target keys of the pairs. Pairs with the same key have the same target, on any rank."""
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
    "vicreg": lambda pool: vicreg_term.of_pool(pool, SEED),
    "sigreg": lambda pool: sigreg_term.of_pool(pool, SEED),
    "coding_rate": lambda pool: rate_term.of_pool(pool, SEED),
}


class RankPairs(NamedTuple):
    """Padded pairs of one rank."""

    prediction: torch.Tensor
    target: torch.Tensor
    key: torch.Tensor
    record: torch.Tensor
    valid: torch.Tensor


def split_pairs(ranks: int, padding: int = 0, pad_value: float = 0.0) -> list[RankPairs]:
    """Return the same twelve pairs split over ranks in order, each part with `padding` pairs of `pad_value` added."""
    torch.manual_seed(0)
    prediction, target, key = torch.randn(PAIRS, WIDTH), torch.randn(PAIRS, WIDTH), torch.tensor(KEYS)
    size = PAIRS // ranks
    out = []
    for rank in range(ranks):
        local = slice(rank * size, (rank + 1) * size)
        pad = torch.full((padding, WIDTH), pad_value)
        out.append(
            RankPairs(
                torch.cat([prediction[local], pad]).requires_grad_(),
                torch.cat([target[local], pad + 1]).requires_grad_(),
                torch.cat([key[local], torch.zeros(padding, dtype=torch.int64)]),
                torch.cat([torch.arange(PAIRS)[local], torch.zeros(padding, dtype=torch.int64)]),
                torch.arange(size + padding) < size,
            )
        )
    return out


def pool_of(all_ranks: list[RankPairs], rank: int) -> Pool:
    """Return the pool that `gather_pool` makes on one rank, with detached tensors of its peers as from a collective."""
    local = all_ranks[rank]

    def packed(rank_pairs: RankPairs) -> list[torch.Tensor]:
        """Return the two tensors that a rank sends: its embeddings, and their keys, records and flags."""
        return [
            torch.cat([rank_pairs.prediction, rank_pairs.target], dim=1).detach(),
            torch.stack(
                [rank_pairs.key, rank_pairs.record, torch.zeros_like(rank_pairs.key), rank_pairs.valid.long()], dim=1
            ),
        ]

    def all_gather(tensor: torch.Tensor) -> torch.Tensor:
        which = next(
            number
            for number, value in enumerate(packed(local))
            if value.shape == tensor.shape and torch.equal(value, tensor)
        )
        return torch.cat([packed(rank_pairs)[which] for rank_pairs in all_ranks])

    none = torch.zeros(0, dtype=torch.int64)
    batch = Batch(
        none,
        none,
        none,
        none,
        none,
        none,
        none,
        local.key,
        local.record,
        torch.zeros_like(local.key),
        local.valid,
        none,
        none,
        none,
        none,
        none,
    )
    return gather_pool(local.prediction, local.target, batch, Gather(all_gather, rank))


def losses_and_gradients(term: str, all_ranks: list[RankPairs]) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Return the value on each rank, and the gradients of all valid pairs, computed one rank after the other."""
    values = []
    for rank in range(len(all_ranks)):
        value = TERMS[term](pool_of(all_ranks, rank))
        value.backward()
        values.append(value.item())
    gradients = [
        torch.cat([getattr(rank_pairs, side).grad[rank_pairs.valid] for rank_pairs in all_ranks])
        for side in ("prediction", "target")
    ]
    return values, *gradients


@pytest.fixture(scope="module")
def single() -> dict[str, tuple[list[float], torch.Tensor, torch.Tensor]]:
    return {term: losses_and_gradients(term, split_pairs(1)) for term in TERMS}


def test_the_single_pool_of_info_nce_equals_the_loops_of_the_reference(single):
    single = single["info_nce"]
    [rank_pairs] = split_pairs(1)
    each = info_nce(
        [
            Pair(*pair, record, True)
            for record, pair in enumerate(zip(rank_pairs.prediction, rank_pairs.target, KEYS, strict=True))
        ],
        TEMPERATURE,
    )
    sum(each).backward()
    torch.testing.assert_close(single[0][0], sum(each).item(), rtol=1e-6, atol=0)
    torch.testing.assert_close(single[1], rank_pairs.prediction.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(single[2], rank_pairs.target.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("term", TERMS)
def test_ranks_together_have_the_value_and_the_gradient_of_the_single_pool(term, ranks, padding, single):
    single = single[term]
    values, prediction, target = losses_and_gradients(term, split_pairs(ranks, padding, pad_value=0.5))
    torch.testing.assert_close(sum(values), single[0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(prediction, single[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(target, single[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("term", TERMS)
def test_the_gradient_depends_on_the_targets_of_other_ranks(term, single):
    """Pairs of other ranks matter, and the equality in the test above is not trivial."""
    all_ranks = split_pairs(3)
    for rank_pairs in all_ranks:
        TERMS[term](pool_of([rank_pairs], 0)).backward()
    alone = torch.cat([rank_pairs.target.grad for rank_pairs in all_ranks])
    assert (alone - single[term][2]).norm() > 0.1 * single[term][2].norm()


@pytest.mark.parametrize("pad_value", [0.0, 1e4, -3.0])
@pytest.mark.parametrize("term", TERMS)
def test_padding_has_no_influence_and_no_gradient(term, pad_value, single):
    all_ranks = split_pairs(2, padding=2, pad_value=pad_value)
    values, prediction, _ = losses_and_gradients(term, all_ranks)
    torch.testing.assert_close(sum(values), single[term][0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(prediction, single[term][1], rtol=1e-5, atol=1e-6)
    for rank_pairs in all_ranks:
        assert (
            not rank_pairs.prediction.grad[~rank_pairs.valid].any()
            and not rank_pairs.target.grad[~rank_pairs.valid].any()
        )


@pytest.mark.parametrize("term", TERMS)
def test_a_rank_without_pairs_contributes_nothing(term):
    """Its own slice of the pool is padding: the value and the gradient are 0, and all numbers are defined."""
    with_pairs, _ = split_pairs(2, padding=1)
    empty = RankPairs(
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


def test_equal_targets_are_not_negatives():
    """Two pairs with the same target have no negatives, and their loss is 0."""
    assert info_nce_of_two_pairs(key=[4, 4]) == 0
    assert info_nce_of_two_pairs(key=[4, 5]) == pytest.approx(2 * torch.log(torch.tensor(2.0)).item())


def test_targets_of_the_same_record_or_the_other_direction_are_not_negatives():
    assert info_nce_of_two_pairs(key=[4, 5], record=[8, 8]) == info_nce_of_two_pairs(key=[4, 5], direction=[0, 1]) == 0


def info_nce_of_two_pairs(key, record=(0, 1), direction=(0, 0)) -> float:
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


def test_an_equal_target_counts_as_retrieved():
    """Prediction 0 is nearest to target 1, which counts as retrieved exactly if both targets are the same."""
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
