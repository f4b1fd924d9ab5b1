"""The embedding monitors, on embeddings with known results."""

import pytest
import torch

from pretrain.objectives import monitors as monitors_module
from pretrain.objectives.collapse import has_collapsed
from pretrain.objectives.monitors import effective_rank, embedding_monitors
from pretrain.objectives.pool import Pool


def pool(
    prediction: torch.Tensor, target: torch.Tensor, key: list[int] | None = None, valid: list[bool] | None = None
) -> Pool:
    size = len(prediction)
    return Pool(
        prediction,
        target,
        torch.tensor(key or list(range(size))),
        torch.arange(size),
        torch.zeros(size, dtype=torch.int64),
        torch.tensor(valid or [True] * size),
        slice(0, size),
    )


@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_the_effective_rank_of_n_equal_directions_is_n(n):
    axes = torch.cat([torch.eye(n), -torch.eye(n)])  # already centred
    assert effective_rank(3 * axes + 100).item() == pytest.approx(n, rel=1e-4)
    rotation = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0)))[0]
    assert effective_rank(axes @ rotation).item() == pytest.approx(n, rel=1e-4)


def test_the_effective_rank_of_one_line_is_one():
    line = torch.outer(torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.arange(1.0, 21.0))
    assert effective_rank(line + 5).item() == pytest.approx(1, abs=1e-3)


def test_the_effective_rank_weighs_directions_by_their_singular_values():
    """With singular values 3 : 1, the rank is the exponential of the entropy of (3/4, 1/4)."""
    values = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    assert effective_rank(values).item() == pytest.approx(4 / 3**0.75, rel=1e-5)


def test_the_effective_rank_of_equal_embeddings_is_one_and_finite():
    assert effective_rank(torch.ones(10, 4)).item() == 1


def test_the_smaller_effective_rank_is_reported():
    spread = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    line = torch.outer(spread[:, 0], torch.ones(8))
    for one, other in ((spread, line), (line, spread)):
        assert embedding_monitors(pool(one, other))["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_the_effective_rank_uses_only_the_first_pairs(monkeypatch):
    """The cost of the rank grows with the cube of the number of pairs. The other monitors use all pairs."""
    monkeypatch.setattr(monitors_module, "RANK_PAIRS", 20)
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 60, 16, generator=generator)
    found, first = embedding_monitors(pool(prediction, target)), embedding_monitors(pool(prediction[:20], target[:20]))
    assert found["effective_rank"] == first["effective_rank"] and found["paired_cosine"] != first["paired_cosine"]


def test_cosines_of_pairs_and_of_negatives():
    monitors = embedding_monitors(pool(torch.eye(3), torch.eye(3)))
    assert monitors["paired_cosine"] == 1 and monitors["shuffled_cosine"] == 0 and monitors["retrieval_at_1"] == 1
    with_equal = embedding_monitors(
        pool(torch.eye(3), torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]]), key=[1, 1, 2])
    )
    assert with_equal["shuffled_cosine"] == 0, "equal targets must not be negatives"


def test_a_rate_is_the_count_over_the_pairs():
    target = torch.eye(10)
    prediction = torch.cat([target[:9], target[:1]])
    assert embedding_monitors(pool(prediction, target))["retrieval_at_1"] == 9 / 10, (
        "the rate must not be rounded to fp32"
    )


def test_padding_is_ignored():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)
    padded = embedding_monitors(
        pool(
            torch.cat([prediction, torch.full((3, 4), 1e6)]),
            torch.cat([target, torch.full((3, 4), 1e6)]),
            list(range(6)) + [0] * 3,
            [True] * 6 + [False] * 3,
        )
    )
    assert padded == pytest.approx(embedding_monitors(pool(prediction, target)))


def test_collapse_is_detected_although_the_loss_is_low():
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(16, generator=generator)
    collapsed = direction + 0.02 * torch.randn(2, 100, 16, generator=generator)
    monitors = embedding_monitors(pool(collapsed[0], collapsed[1]))
    assert monitors["paired_cosine"] > 0.99
    assert has_collapsed(monitors)
    target = torch.randn(100, 16, generator=generator)
    healthy = embedding_monitors(pool(target + 0.1 * torch.randn(100, 16, generator=generator), target))
    assert not has_collapsed(healthy) and healthy["retrieval_at_1"] > 0.9


def test_random_embeddings_have_not_collapsed():
    generator = torch.Generator().manual_seed(0)
    assert not has_collapsed(
        embedding_monitors(pool(torch.randn(100, 16, generator=generator), torch.randn(100, 16, generator=generator)))
    )


def test_too_few_pairs_give_no_verdict():
    assert embedding_monitors(pool(torch.ones(1, 4), torch.ones(1, 4))) == {}
    assert not has_collapsed({})
    found_in_context = {"paired_cosine": 0.9997, "shuffled_cosine": 0.9977, "retrieval_at_1": 0.87}
    assert has_collapsed(found_in_context, in_context=True) and not has_collapsed(found_in_context)
    spread_out = {"paired_cosine": 0.994, "shuffled_cosine": 0.005, "retrieval_at_1": 1.0}
    assert not has_collapsed(spread_out, in_context=True)
    same = embedding_monitors(pool(torch.eye(2), torch.eye(2), key=[7, 7]))
    assert "shuffled_cosine" not in same and not has_collapsed(same)


def test_embeddings_that_are_not_finite_give_no_monitors_instead_of_an_error():
    broken = torch.randn(10, 4)
    broken[3, 1] = torch.nan
    assert embedding_monitors(pool(broken, torch.randn(10, 4))) == {}


def test_equal_embeddings_are_not_retrieved():
    same = torch.ones(6, 4)
    assert embedding_monitors(pool(same, same))["retrieval_at_1"] == 0


def test_a_collapse_to_a_few_directions_is_detected():
    """The first values come from a prototype with the cosine distance and a variance hinge."""
    assert has_collapsed(
        {"paired_cosine": 0.999, "shuffled_cosine": 0.002, "retrieval_at_1": 0.006, "effective_rank": 4.5}
    )
    assert not has_collapsed(
        {"paired_cosine": 0.979, "shuffled_cosine": 0.003, "retrieval_at_1": 1.0, "effective_rank": 184.0}
    )


def test_pairs_hardly_closer_than_negatives_have_collapsed():
    def monitors(paired: float, shuffled: float, retrieval: float = 0.05) -> dict[str, float]:
        return {
            "paired_cosine": paired,
            "shuffled_cosine": shuffled,
            "retrieval_at_1": retrieval,
            "effective_rank": 2.0,
        }

    assert has_collapsed(monitors(0.62, 0.55))
    assert not has_collapsed(monitors(0.62, 0.55, retrieval=0.2))
    assert not has_collapsed(monitors(0.8, 0.55)), "pairs are closer than negatives"
    assert not has_collapsed(monitors(0.4, 0.38)), "embeddings point in all directions"


@pytest.mark.parametrize("size", [2, 3, 20])
def test_the_monitors_equal_loops_over_pairs(size):
    generator = torch.Generator().manual_seed(size)
    prediction, noise = torch.randn(size, 5, generator=generator), torch.randn(size, 5, generator=generator)
    target, key = prediction + 1.2 * noise, [number % 17 for number in range(size)]
    cosines = [[torch.cosine_similarity(one, other, dim=0).item() for other in target] for one in prediction]
    negatives = {(one, other) for one in range(size) for other in range(size) if key[one] != key[other]}
    hits = [
        all(cosines[one][one] > cosines[one][other] for other in range(size) if (one, other) in negatives)
        for one in range(size)
    ]
    monitors = embedding_monitors(pool(prediction, target, key))
    assert size < 20 or 0 < sum(hits) < size
    assert monitors == pytest.approx(
        {
            "paired_cosine": sum(cosines[one][one] for one in range(size)) / size,
            "retrieval_at_1": sum(hits) / size,
            "shuffled_cosine": sum(cosines[one][other] for one, other in negatives) / len(negatives),
            "effective_rank": min(effective_rank(prediction).item(), effective_rank(target).item()),
        },
        rel=1e-5,
    )
