"""The budget and the learning rate depend on the consumed fraction of the run."""

import pytest

from pretrain.data.loader import Consumed
from pretrain.planning.budget import consumed_fraction
from pretrain.sections import TrainConfig
from pretrain.training.schedule import learning_rate


def train(**changes) -> TrainConfig:
    return TrainConfig(
        **{
            "global_batch_rows": 8,
            "micro_batch_rows": 4,
            "learning_rate": 2.0,
            "final_rate": 0.1,
            "warmup_fraction": 0.1,
        }
        | changes
    )


@pytest.mark.parametrize(
    ("schedule", "middle"),
    [("cosine", 2.0 * (0.1 + 0.9 * 0.5)), ("linear", 2.0 * (0.1 + 0.9 * 0.5)), ("warmup_stable_decay", 2.0)],
)
def test_the_rate_rises_linearly_then_falls_to_the_final_rate(schedule, middle):
    config = train(steps=10, schedule=schedule)
    assert [learning_rate(fraction, config) for fraction in (0.0, 0.05, 0.1, 0.55, 1.0, 1.3)] == pytest.approx(
        [0, 1, 2, middle, 0.2, 0.2]
    )


def test_the_stable_phase_ends_where_the_decay_begins():
    config = train(steps=10, schedule="warmup_stable_decay", decay_fraction=0.4)
    assert [learning_rate(fraction, config) for fraction in (0.2, 0.6, 0.8, 1.0)] == pytest.approx(
        [2, 2, 2 * (0.1 + 0.9 * 0.5), 0.2]
    )


@pytest.mark.parametrize(
    ("budget", "fraction"),
    [({"steps": 40}, 0.25), ({"tokens": 1000}, 0.5), ({"records": 400}, 0.75), ({"epochs": 2}, 1.5)],
)
def test_each_budget_counts_its_own_unit(budget, fraction):
    assert (
        consumed_fraction(Consumed(steps=10, tokens=500, records=300), train(**budget), total_epoch_records=200)
        == fraction
    )
